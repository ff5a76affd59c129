"""Reading a request's body whole, under a limit, and giving it to the application again."""

from __future__ import annotations

from math import inf

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope


class BodyTooLarge(Exception):
    """The body is longer than the limit."""


class ClientGone(Exception):
    """The client disconnected before its body was complete."""


async def read_body(scope: Scope, receive: Receive, limit: float = inf) -> bytes:
    """The body of an HTTP request; what a client declares too long is refused before it is read.

    Raises: BodyTooLarge for more than `limit` bytes, ClientGone.
    """
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI `receive` that gives `body` once, and then what comes after it: the client's disconnect."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
