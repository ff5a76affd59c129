"""Readiness and the stop, with a stand-in for uvicorn's server."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from asgi_stubs import Connection, Echo, Gate, drive

from rkv_vllm.server.lifecycle import Lifecycle


def new_server() -> Any:
    return SimpleNamespace(should_exit=False, force_exit=False)


async def until_exit(server: Any) -> None:
    while not server.should_exit:
        await asyncio.sleep(0.001)


async def ask(lifecycle: Lifecycle, path: str, *, errored: bool = False) -> Connection:
    connection = Connection(path)
    state = SimpleNamespace(engine_client=SimpleNamespace(errored=errored))
    connection.scope["app"] = SimpleNamespace(state=state)
    await connection.start(lifecycle)
    return connection


def test_ready_until_the_engine_dies_or_the_stop_begins() -> None:
    """And /health is vLLM's throughout, so that a stopping server is not killed as a dead one."""

    async def test() -> None:
        lifecycle, server = Lifecycle(Echo()), new_server()
        assert (await ask(lifecycle, "/ready")).status == 200
        dead = await ask(lifecycle, "/ready", errored=True)
        assert dead.status == 503
        assert "engine is dead" in dead.body.decode()
        lifecycle.stop(server, 30)
        stopping = await ask(lifecycle, "/ready")
        assert stopping.status == 503
        assert "stopping" in json.loads(stopping.body)["error"]["message"]
        assert (await ask(lifecycle, "/health")).status == 200
        assert (await ask(lifecycle, "/health\n")).status == 503
        assert (await ask(lifecycle, "/metrics")).status == 200
        await until_exit(server)

    drive(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_waits_for_what_runs_and_refuses_what_comes(stream: bool) -> None:
    """The server is asked to exit only when the running request has its whole answer."""

    async def test() -> None:
        gate = Gate(stream=stream)
        lifecycle, server = Lifecycle(gate), new_server()
        running = Connection()
        task = running.start(lifecycle)
        await gate.until_entered(1)
        lifecycle.stop(server, 30)
        late = Connection()
        await late.start(lifecycle)
        assert late.status == 503
        assert (b"retry-after", b"5") in late.sent[0]["headers"]
        assert gate.entered == 1
        for _ in range(100):  # turns of the loop: whatever waits for nothing has run by then
            await asyncio.sleep(0)
        assert not server.should_exit
        gate.open.set()
        await task
        await until_exit(server)
        assert running.status == 200
        assert running.body.endswith(b"data: [DONE]\n\n" if stream else b"null")
        assert not server.force_exit

    drive(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cause", ["timeout", "second signal"])
def test_what_is_left_is_aborted_and_told_so(stream: bool, cause: str) -> None:
    """The application sees its client leave, which aborts it; the client gets 503 or an error event."""

    async def test() -> None:
        gate = Gate(stream=stream)
        lifecycle, server = Lifecycle(gate), new_server()
        running = Connection()
        task = running.start(lifecycle)
        await gate.until_entered(1)
        lifecycle.stop(server, 0.01 if cause == "timeout" else 30)
        if cause == "second signal":
            await asyncio.sleep(0)
            lifecycle.stop(server, 30)
        await task
        await until_exit(server)
        assert gate.disconnected == 1
        assert running.sent[-1].get("more_body", False) is False
        if stream:
            assert running.status == 200
            first, last = running.body.split(b"\n\n")[:2]
            assert first == b"data: 1"
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 503
        else:
            assert running.status == 503
            assert json.loads(running.body)["error"]["code"] == 503
        assert not server.force_exit

    drive(test)


def test_anthropics_clients_are_told_by_an_event_of_their_own() -> None:
    """They take a stream that ends without one for a whole answer."""

    async def test() -> None:
        gate = Gate(stream=True)
        lifecycle, server = Lifecycle(gate), new_server()
        running = Connection("/v1/messages")
        task = running.start(lifecycle)
        await gate.until_entered(1)
        lifecycle.stop(server, 0.01)
        await task
        name, data = running.body.split(b"\n\n")[1].split(b"\n")
        assert name == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["type"] == "error"
        await until_exit(server)

    drive(test)


def test_does_not_wait_for_ever_for_a_request_that_ignores_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is then told not to wait for it either."""
    monkeypatch.setattr("rkv_vllm.server.lifecycle.GRACE", 0.01)

    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(3600)

    async def test() -> None:
        lifecycle, server = Lifecycle(stubborn), new_server()
        task = Connection().start(lifecycle)
        await asyncio.sleep(0)
        lifecycle.stop(server, 0.01)
        await until_exit(server)
        assert server.force_exit
        task.cancel()

    drive(test)


def test_a_client_that_leaves_is_noticed() -> None:
    """As without the middleware, and it is no longer waited for."""

    async def test() -> None:
        gate = Gate()
        lifecycle, server = Lifecycle(gate), new_server()
        leaving = Connection()
        task = leaving.start(lifecycle)
        await gate.until_entered(1)
        leaving.leave.set()
        await task
        assert gate.disconnected == 1
        lifecycle.stop(server, 30)
        await until_exit(server)

    drive(test)
