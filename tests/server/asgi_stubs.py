"""Small ASGI applications to put middlewares around, and a client for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream")


def client(app: ASGIApp, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", **options)


def drive(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


class Echo:
    """Answers with the path, headers, state and body that reached it."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        seen = {
            "path": scope["path"],
            "headers": {name.decode(): value.decode("latin-1") for name, value in scope["headers"]},
            "state": scope.get("state", {}),
            "body": body.decode(),
        }
        await send({"type": "http.response.start", "status": self.status, "headers": [JSON]})
        await send({"type": "http.response.body", "body": json.dumps(seen).encode()})


class Gate:
    """Holds every request, after the first event of its stream if it has one, until `open` is set."""

    def __init__(self, *, stream: bool = False, error: Exception | None = None) -> None:
        self.open = asyncio.Event()
        self.entered = 0
        self.disconnected = 0
        self._stream = stream
        self._error = error

    async def until_entered(self, requests: int) -> None:
        while self.entered < requests:
            await asyncio.sleep(0.001)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.entered += 1
        headers = [EVENTS if self._stream else JSON]
        if self._stream:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        opened, left = asyncio.ensure_future(self.open.wait()), asyncio.ensure_future(receive())
        try:
            await asyncio.wait((opened, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            opened.cancel()
            left.cancel()
        if left.done() and not left.cancelled():
            assert left.result()["type"] == "http.disconnect"
            self.disconnected += 1
        if self._error is not None:
            raise self._error
        if self._stream:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"null"})


class Connection:
    """One request whose client can leave, for what httpx's transport cannot do."""

    def __init__(self, path: str = "/v1/completions", body: bytes = b"{}") -> None:
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [JSON],
            "client": ("10.0.0.1", 1),
        }
        self.leave = asyncio.Event()
        self.sent: list[Message] = []
        self._body: bytes | None = body

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def start(self, app: ASGIApp) -> asyncio.Task[None]:
        async def run() -> None:
            await app(self.scope, self.receive, self.send)

        return asyncio.create_task(run())

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])
