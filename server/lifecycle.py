"""Readiness, and a stop that lets running requests finish.

vLLM's own answer to SIGTERM stops the engine while its HTTP server still accepts requests, and with running
streams the process may then never end. Here the HTTP side goes first: on SIGTERM (or SIGINT) new requests
get 503, running ones have `--shutdown-timeout` seconds, what is left is ended with an error, and then vLLM's
server is asked to exit, which stops an engine that has nothing to do. A second signal ends at once what is
running.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkv_vllm.server.asgi import route_path
from rkv_vllm.server.errors import ErrorResponse, error_response

READY = "/ready"
#: Answered by vLLM whatever this server is doing, and not waited for.
WATCHED = frozenset({"/health", "/metrics"})
#: Seconds after which a client may try again, by then at another server.
RETRY_AFTER = "5"
#: Seconds that requests have to end after they have been told to.
GRACE = 5.0
STOPPING = "The server is stopping."


def _unavailable(message: str) -> ErrorResponse:
    return error_response(503, message, headers={"Retry-After": RETRY_AFTER})


class Lifecycle:
    """ASGI middleware: `/ready`, 503 while stopping, and the stop itself.

    Expects what vLLM's launcher puts into the application's state: `engine_client` and uvicorn's `server`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._running = 0
        self._idle = asyncio.Event()
        self._cut = asyncio.Event()
        self._stop: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._listen(scope["app"].state)
            await self.app(scope, receive, send)
        elif (path := route_path(scope)) == READY:
            await self._ready(scope, receive, send)
        elif path in WATCHED:
            await self.app(scope, receive, send)
        elif self._stop is not None:
            await _unavailable(STOPPING)(scope, receive, send)
        else:
            await self._run(scope, receive, send)

    def stop(self, server: Any, timeout: float) -> None:
        """Begin to stop `server` (uvicorn's), or, the second time, end at once what is still running.

        Args:
            timeout: seconds for running requests to finish.
        """
        if self._stop is None:
            self._stop = asyncio.create_task(self._drain(server, timeout))
        else:
            self._cut.set()

    def _listen(self, state: Any) -> None:
        """Take the signals over from vLLM's launcher, which sets handlers before the application starts."""
        loop = asyncio.get_running_loop()
        timeout = state.engine_client.vllm_config.shutdown_timeout
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, state.server, timeout)

    async def _drain(self, server: Any, timeout: float) -> None:
        cut = asyncio.create_task(self._cut.wait())
        idle = asyncio.create_task(self._wait_until_idle())
        await asyncio.wait((cut, idle), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._cut.set()
        await asyncio.wait((idle,), timeout=GRACE)
        server.force_exit = not idle.done()  # does not wait for requests that would not end
        idle.cancel()
        server.should_exit = True

    async def _wait_until_idle(self) -> None:
        while self._running:
            self._idle.clear()
            await self._idle.wait()

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        # No request comes here before the model is loaded: vLLM's launcher listens only then.
        if self._stop is not None:
            await _unavailable(STOPPING)(scope, receive, send)
        elif scope["app"].state.engine_client.errored:
            await _unavailable("The engine is dead.")(scope, receive, send)
        else:
            await JSONResponse({"status": "ready"})(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = AbortableSend(send, self._cut)
        self._running += 1
        try:
            await self.app(scope, disconnecting(receive, self._cut), answer)
            if self._cut.is_set():
                await answer.end(scope, receive)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()


def disconnecting(receive: Receive, cut: asyncio.Event) -> Receive:
    """An ASGI `receive` whose client leaves when `cut` is set: this tells vLLM to abort the request."""

    async def receive_or_cut() -> Message:
        message, cutting = asyncio.ensure_future(receive()), asyncio.ensure_future(cut.wait())
        try:
            await asyncio.wait((message, cutting), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            message.cancel()
            cutting.cancel()

    return receive_or_cut


class AbortableSend:
    """ASGI `send` that passes nothing on once `cut` is set; `end` then tells the client why."""

    def __init__(self, send: Send, cut: asyncio.Event) -> None:
        self._send = send
        self._cut = cut
        self._started = False
        self._complete = False
        self._event_stream = False

    async def __call__(self, message: Message) -> None:
        if self._cut.is_set() and not self._complete:
            return
        if message["type"] == "http.response.start":
            self._started = True
            content_type = Headers(raw=message["headers"]).get("content-type", "")
            self._event_stream = content_type.startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def end(self, scope: Scope, receive: Receive) -> None:
        """End an incomplete answer: 503, or an error as the last event of a stream. Else it breaks off."""
        if self._complete or scope["type"] != "http":
            return
        response = _unavailable(STOPPING)
        if not self._started:
            await response(scope, receive, self._send)
        elif self._event_stream:
            body = response.event(scope)
            with suppress(OSError):  # the client may have left
                await self._send({"type": "http.response.body", "body": body, "more_body": False})
