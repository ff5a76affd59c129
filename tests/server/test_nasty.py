"""Nasty requests through all our middlewares, as a server puts them together, around a small application."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
from asgi_stubs import client, drive
from fastapi import FastAPI, Request
from nasty import PATHS, REFUSED, ROUTES, UNFIT

from rkv_vllm.server.middleware import KvCacheMiddleware
from rkv_vllm.server.operations import OperationsMiddleware
from rkv_vllm.server.routes import OPEN_ROUTES

WITH_OBJECT = ROUTES[:3]


def ask(monkeypatch: pytest.MonkeyPatch, path: str, content: bytes) -> httpx.Response:
    """The answer to a POST; one of the application's own would be 200."""
    for name, limit in {"N": "4", "MAX_TOKENS": "100"}.items():
        monkeypatch.setenv(f"RKV_LIMIT_{name}", limit)
    app = FastAPI()
    processor = SimpleNamespace(process_outputs=None)
    model = SimpleNamespace(max_model_len=2048)
    app.state.engine_client = SimpleNamespace(
        generate=None, errored=False, output_processor=processor, model_config=model
    )

    async def serve(request: Request) -> str:
        await request.json()
        return "served"

    for route in OPEN_ROUTES:
        app.post(route)(serve)
    app.add_middleware(KvCacheMiddleware)
    app.add_middleware(OperationsMiddleware)
    answers = []

    async def test() -> None:
        async with client(app) as http:
            headers = {"content-type": "application/json"}
            answers.append(await http.post(path, content=content, headers=headers))

    drive(test)
    return answers[0]


def check(answer: httpx.Response, status: int) -> None:
    """An error in OpenAI's envelope that any client can read, and none has to pay for."""
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status
    assert answer.text.isascii()
    assert len(answer.content) < 500


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("name", UNFIT)
def test_unfit_json_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, path: str) -> None:
    """Proves it on every route that takes a body."""
    check(ask(monkeypatch, path, UNFIT[name]), 400)


@pytest.mark.parametrize("path", WITH_OBJECT)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_allowed_is_refused_briefly(
    monkeypatch: pytest.MonkeyPatch, name: str, path: str
) -> None:
    """Proves that a refusal escapes and cuts what it repeats."""
    check(ask(monkeypatch, path, REFUSED[name]), 400)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_a_path_that_leads_nowhere_is_not_served(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Proves that what the application's router would take for a route is none for it either."""
    check(ask(monkeypatch, path, b"{}"), 404)


@pytest.mark.parametrize("path", OPEN_ROUTES)
def test_the_others_are_served(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Proves that the application of the tests above would have answered."""
    answer = ask(monkeypatch, path.replace("{id}", "a"), b'{"prompt": "\xc3\xa9 \\ud83d\\ude00"}')
    assert answer.status_code == (405 if path == "/v1/kv_cache" else 200)
