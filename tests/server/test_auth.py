"""API keys in front of the application."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from asgi_stubs import Echo, client, drive

from rkv_vllm.server.auth import ApiKeys, Authentication

KEY, OTHER = "sk-" + "a" * 40, "sk-" + "b" * 40


def guarded(*public: str) -> Authentication:
    keys = ApiKeys()
    keys.add(KEY, "alice")
    keys.add(OTHER)
    return Authentication(Echo(), keys, public)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/invocations", "/docs", "/anything", "/health/"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"x-api-key": "wrong"},
        {"authorization": "Bearer wrong", "x-api-key": KEY},
    ],
)
def test_refuses_without_a_known_key(path: str, headers: dict[str, str]) -> None:
    """On every path, and OpenAI's envelope says why without the key in it."""

    async def test() -> None:
        async with client(guarded("/health")) as http:
            answer = await http.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("AuthenticationError", 401, None)
        assert KEY not in answer.text

    drive(test)


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": f"Bearer {KEY}"}, "alice"),
        ({"authorization": f"bearer  {KEY} "}, "alice"),
        ({"x-api-key": KEY}, "alice"),
        ({"authorization": f"Bearer {OTHER}"}, hashlib.sha256(OTHER.encode()).hexdigest()[:8]),
    ],
)
def test_each_key_opens_and_names_its_caller(headers: dict[str, str], name: str) -> None:
    """The application sees the key's name, by default the start of its hash."""

    async def test() -> None:
        async with client(guarded()) as http:
            answer = await http.post("/v1/completions", headers=headers)
        assert answer.status_code == 200
        assert answer.json()["state"]["api_key"] == name

    drive(test)


def test_leaves_public_paths_and_preflights_open() -> None:
    """And nothing else that looks like a preflight."""
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}

    async def test() -> None:
        async with client(guarded("/health")) as http:
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/health%0a")).status_code == 401
            assert (await http.options("/v1/models", headers=preflight)).status_code == 200
            assert (await http.options("/v1/models")).status_code == 401
            assert (await http.post("/v1/models", headers=preflight)).status_code == 401

    drive(test)


def test_refuses_a_websocket_without_a_key() -> None:
    """The application never sees it."""
    sent = []

    async def test() -> None:
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        await guarded()(scope, None, record)  # type: ignore[arg-type]

    async def record(message: dict[str, object]) -> None:
        sent.append(message)

    drive(test)
    assert sent[0]["type"] == "websocket.http.response.start"
    assert sent[0]["status"] == 401


def test_reads_a_file_of_keys(tmp_path: Path) -> None:
    """A key a line, with or without a name, among comments and blank lines."""
    file = tmp_path / "keys"
    file.write_text(f"# comment {KEY}x\n\nalice {KEY}\n  {OTHER}  \n#{OTHER}x\n")
    keys = ApiKeys()
    keys.read(file)
    assert len(keys) == 2
    assert keys.name_of(KEY) == "alice"
    assert keys.name_of(OTHER) is not None
    assert keys.name_of(f"{KEY}x") is None


def test_a_wrong_line_is_named_and_not_shown(tmp_path: Path) -> None:
    """A message at start ends up in logs."""
    file = tmp_path / "keys"
    file.write_text(f"{OTHER}\nalice {KEY} {OTHER}\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        ApiKeys().read(file)
    assert KEY not in str(caught.value)
