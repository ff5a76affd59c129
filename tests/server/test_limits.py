"""Limits on what a request asks for and on how many run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from asgi_stubs import Connection, Echo, Gate, client, drive

from rkv_vllm.server.limits import Limits, RequestLimits

PATH = "/v1/chat/completions"
LIMITS = Limits(body_bytes=1000, max_tokens=100, n=4)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": "101"}, "max_tokens"),
        ({"max_tokens": 101.0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 101}, "max_completion_tokens"),
        ({"max_output_tokens": 1 << 70}, "max_output_tokens"),
        ({"n": 5}, "n"),
        ({"n": 2, "prompt": ["a", "b", "c"]}, "prompt"),
        ({"prompt": [[1], [2], [3], [4], [5]]}, "prompt"),
        ({"prompt": ["a", "b", "c", "d", "e"]}, "prompt"),
        ({"prompt_embeds": ["a", "b", "c", "d", "e", "f"], "n": 1}, "prompt_embeds"),
        ({"prompt_embeds": ["a", "b"], "prompt": ["a", "b", "c"]}, "prompt"),
        ({"prompt_embeds": ["a", "b", "c", "d"], "prompt": ""}, "prompt_embeds"),
        ({"prompt_embeds": "a", "prompt": [1, 2, 3], "n": 3}, "prompt"),
        ({"prompt_embeds": "a", "prompt": [[1]] * 4}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 0}, "prompt"),
        ({"prompt": ["a"] * 5, "n": -1}, "prompt"),
        ({"messages": [[{"role": "user", "content": "a"}]] * 5}, "messages"),
        ({"query": "a", "items": ["a"] * 5}, "items"),
        ({"query": "a", "items": [[1, 2]] * 5}, "items"),
        ({"n": "9" * 4300, "prompt": ["a"] * 10}, "n"),
        ({"max_tokens": "9" * 4300}, "max_tokens"),
    ],
)
def test_names_the_field_above_its_limit(asked: dict[str, Any], param: str) -> None:
    """Whatever vLLM would read as that number counts as it, and vLLM never sees the request."""

    async def test() -> None:
        application = Echo()
        async with client(RequestLimits(application, replace(LIMITS, body_bytes=10_000))) as http:
            answer = await http.post(PATH, json=asked)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert len(answer.content) < 300
        assert application.calls == 0

    drive(test)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b'{"max_tokens": 100, "n": 4}',
        b'{"max_tokens": null, "n": null}',
        b'{"max_tokens": "many", "n": [9]}',
        b'{"prompt": [1, 2, 3, 4, 5, 6]}',
        b'{"n": 2, "prompt": ["a", "b"]}',
        b'{"prompt_embeds": ["a", "b"], "prompt": ["a", "b"]}',
        b'{"n": 2, "prompt_embeds": "a", "prompt": [1, 2, 3, 4, 5, 6]}',
        b'{"n": 4, "prompt_embeds": [], "prompt": null}',
        b'{"n": 4, "messages": [{"role": "user", "content": [1, 2, 3]}, {}, {}, {}, {}]}',
        b'{"n": 4, "prompt": {"id": "a", "version": "1", "variables": {}}}',
        b'{"n": 4, "input": ["a", "b", "c", "d", "e"]}',
        b"x" * 1000,
    ],
)
def test_passes_on_what_is_within_or_unreadable(body: bytes) -> None:
    """Unchanged: what is wrong in another way is vLLM's to refuse."""

    async def test() -> None:
        async with client(RequestLimits(Echo(), LIMITS)) as http:
            answer = await http.post(PATH, content=body)
        assert answer.status_code == 200
        assert answer.json()["body"].encode() == body

    drive(test)


@pytest.mark.parametrize("limits", [LIMITS, Limits(body_bytes=1000)], ids=["limits", "no limits"])
@pytest.mark.parametrize("body", [b"[" * 201 + b"]" * 201, b'{"model": "\\ud800"}', b'["\xed\xa0\x80"]'])
def test_refuses_json_that_cannot_be_served(limits: Limits, body: bytes) -> None:
    """On every route and whatever the limits, in a sentence that can be sent."""

    async def test() -> None:
        application = Echo()
        async with client(RequestLimits(application, limits)) as http:
            answer = await http.post("/tokenize", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "BadRequestError"
        assert application.calls == 0

    drive(test)


@pytest.mark.parametrize("declared", ["\u00b2", "9" * 5000, "-1", "1e3", " 1"])
def test_a_declared_length_is_no_number_until_it_is_one(declared: str) -> None:
    """One of superscripts counts as none, and one beyond what an integer may have is too long."""

    async def test() -> None:
        connection = Connection(PATH, b"{}")
        connection.scope["headers"] = [(b"content-length", declared.encode("latin-1"))]
        await connection.start(RequestLimits(Echo(), LIMITS))
        assert connection.status == (413 if len(declared) > 100 else 200)

    drive(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_refuses_a_long_body(chunked: bool) -> None:
    """With a declared length before it is read, and without one as soon as it is too long."""
    given = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal given
        for _ in range(100):
            given += 100
            yield b"x" * 100

    async def test() -> None:
        limited = RequestLimits(Echo(), LIMITS)
        async with client(limited) as http:
            answer = await http.post(PATH, content=chunks() if chunked else b"x" * 1001)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "RequestTooLargeError"
        assert not limited.running
        assert given == (1100 if chunked else 0)

    drive(test)


def keyed(name: str) -> Connection:
    connection = Connection(PATH)
    connection.scope["state"] = {"api_key": name}
    return connection


def test_one_too_many_gets_503_and_of_one_key_429() -> None:
    """Both say when to come again; another key has its own count, and looking is never limited."""

    async def test() -> None:
        gate = Gate()
        limited = RequestLimits(gate, Limits(body_bytes=1000, concurrent=3, concurrent_per_key=2))
        running = [keyed(name) for name in ("a", "a", "b")]
        tasks = [connection.start(limited) for connection in running]
        await gate.until_entered(3)
        for name, status in (("a", 429), ("b", 503), ("c", 503)):
            refused = keyed(name)
            await refused.start(limited)
            assert refused.status == status
            assert (b"retry-after", b"1") in refused.sent[0]["headers"]
            assert json.loads(refused.body)["error"]["code"] == status
        look = keyed("a")
        look.scope["method"] = "GET"
        looking = look.start(limited)
        await gate.until_entered(4)
        gate.open.set()
        await asyncio.gather(*tasks, looking)
        assert [connection.status for connection in running] == [200, 200, 200]

    drive(test)


@pytest.mark.parametrize("end", ["answered", "streamed", "failed", "left", "cancelled", "left early"])
def test_a_slot_comes_back_however_a_request_ends(end: str) -> None:
    """After each end the next request runs."""

    async def test() -> None:
        error = RuntimeError() if end == "failed" else None
        gate = Gate(stream=end == "streamed", error=error)
        limited = RequestLimits(gate, Limits(body_bytes=1000, concurrent=1, concurrent_per_key=1))
        first = keyed("a")
        if end == "left early":
            first._body = None
            first.leave.set()
            await first.start(limited)
            assert gate.entered == 0
        else:
            task = first.start(limited)
            await gate.until_entered(1)
            assert limited.running == {"a": 1}
            if end == "left":
                first.leave.set()
            elif end == "cancelled":
                task.cancel()
            else:
                gate.open.set()
            await asyncio.gather(task, return_exceptions=True)
            assert gate.disconnected == (end == "left")
        assert not limited.running
        second = keyed("a")
        task = second.start(limited)
        await gate.until_entered(1 if end == "left early" else 2)
        gate.open.set()
        await asyncio.gather(task, return_exceptions=True)

    drive(test)


def test_vllms_own_503_says_when_to_come_again() -> None:
    """Its queue limits answer without Retry-After."""

    async def test() -> None:
        async with client(RequestLimits(Echo(status=503), LIMITS)) as http:
            assert (await http.post(PATH)).headers["retry-after"] == "1"
        async with client(RequestLimits(Echo(status=500), LIMITS)) as http:
            assert "retry-after" not in (await http.post(PATH)).headers

    drive(test)
