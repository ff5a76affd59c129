"""Which of vLLM's routes are open, what is said about the others, and slashes behind a path."""

from __future__ import annotations

import io
import json
import logging
import re

import httpx
import pytest
from asgi_stubs import Connection, Echo, client, drive
from fastapi import FastAPI
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from rkv_vllm.server.routes import OPEN_ROUTES, ClosedRoutes, OpenRoutes, TrailingSlashes

CLOSED = [
    *(
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/inference/v1/generate",
        "/inference/v1/abort_requests",
    ),
    *("/invocations", "/ping", "/load", "/tokenize", "/detokenize", "/generative_scoring", "/v1/systemone"),
    *("/sleep", "/wake_up", "/start_profile", "/collective_rpc", "/server_info", "/reset_prefix_cache"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions/batch", "/pause"),
    *("/v1/responses/render", "/v1/completions/derender", "/kv_event_sources", "/tokenizer_info"),
    *("/v1/completions\n", "/v1/responses/resp_1\n", "/v1/responses/resp_1/cancel\n", "/health\r"),
    *("/v1/responses/resp_\x00", "/v1/models\x7f", "/ready\x85", "/proxy\n/v1/models"),
    *("/metrics/x", "/v1/responses/a/b", "/V1/models", "/", "", "//v1/models", "/v1"),
]


def application(*further: str) -> tuple[ASGIApp, Echo]:
    """An application with all routes there are, behind what guards them; and what it serves them with."""
    app, served, routes = FastAPI(), Echo(), OpenRoutes(further)
    for path in [*OPEN_ROUTES, *(path for path in CLOSED if path.isprintable() and path not in ("", "/"))]:
        app.router.routes.append(Route(path, served))
    app.router.routes.append(Route("/v1/responses/{response_id}", served))
    app.add_middleware(ClosedRoutes, open_routes=routes)
    app.add_middleware(TrailingSlashes, open_routes=routes)
    return app, served


def status_and_message(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"]


@pytest.mark.parametrize("root", ["", "/proxy"])
def test_everything_but_the_open_routes_is_closed(root: str) -> None:
    """Also with a proxy's prefix, in other spellings, and with slashes behind it: none of it is served."""

    async def test() -> None:
        app, served = application()
        for path in (each + slashes for each in CLOSED for slashes in ("", "/", "//")):
            connection = Connection(root + path)
            connection.scope |= {"root_path": root, "query_string": b""}
            await connection.start(app)
            assert connection.status == 404
            assert json.loads(connection.body)["error"]["type"] == "NotFoundError"
        assert served.calls == 0

    drive(test)


def test_open_routes_answer_and_more_can_be_opened() -> None:
    """Templates stand for one part of a path."""

    async def test() -> None:
        app, _ = application("/tokenize")
        async with client(app) as http:
            for path in ("/v1/chat/completions", "/v1/responses/resp_1/cancel", "/health", "/tokenize"):
                assert (await http.post(path)).status_code == 200
        connection = Connection("/proxy/v1/models")
        connection.scope |= {"root_path": "/proxy", "query_string": b""}
        await connection.start(app)
        assert connection.status == 200

    drive(test)


def test_a_closed_route_says_how_to_open_it() -> None:
    """And only a route that vLLM has; a preflight, which is answered without a key, learns nothing."""

    async def test() -> None:
        async with client(application()[0]) as http:
            closed = "/tokenize is closed on this server: --open-routes /tokenize (RKV_OPEN_ROUTES) opens it."
            assert status_and_message(await http.post("/tokenize")) == (404, closed)
            nowhere = (404, "There is no such route.")
            assert status_and_message(await http.post("/tokenise")) == nowhere
            assert status_and_message(await http.options("/tokenize")) == nowhere

    drive(test)


def test_slashes_behind_an_open_path_lead_to_it() -> None:
    """With the method and the query kept, as vLLM's router does it; nothing is served under such a path."""

    async def test() -> None:
        app, served = application()
        async with client(app) as http:
            for path in ("/v1/models/", "/v1/chat/completions//", "/v1/responses/resp_a%3Fb/", "/health/"):
                answer = await http.post(f"{path}?a=1&b=%2F")
                assert answer.status_code == 307
                assert answer.headers["location"] == f"{path.rstrip('/')}?a=1&b=%2F"
            assert (await http.post("/v1/models/")).headers["location"] == "/v1/models"
            assert served.calls == 0
            followed = await http.post("/v1/models/", content=b"body", follow_redirects=True)
            assert (followed.json()["path"], followed.json()["body"]) == ("/v1/models", "body")
            metrics = await http.get("/metrics/")
            assert (metrics.status_code, metrics.json()["path"]) == (200, "/metrics")

    drive(test)


def test_the_log_says_at_start_what_is_open() -> None:
    """vLLM's own list has all routes; a route to open that vLLM does not have is named."""
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    log = logging.getLogger("vllm.rkv_vllm.server.routes")
    # Not by caplog: whether that hears vLLM's log once, twice or never depends on who imported vLLM first.
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with TestClient(application("/tokenize", "/tokenise")[0]):
            opened, closed, unknown = lines.getvalue().splitlines()
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
    assert {"/tokenize", "/v1/models", "/v1/kv_cache"} <= set(re.split("[ ,]+", opened))
    assert {"/detokenize", "/ping"} <= set(re.split("[ ,]+", closed))
    assert not {"/tokenize", "/v1/models", "/v1/responses/{response_id}"} & set(re.split("[ ,]+", closed))
    assert unknown == "--open-routes: vLLM has no route /tokenise with these options"
