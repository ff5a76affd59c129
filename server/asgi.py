"""What the middlewares share of ASGI: whose request this is, its path and state, and its body."""

from __future__ import annotations

import re
from math import inf
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def is_request(scope: Scope) -> bool:
    """Whether this is an HTTP request or a WebSocket, and not the application's start and end."""
    return scope["type"] in ("http", "websocket")


def route_path(scope: Scope) -> str | None:
    """The path as the application's routes see it: without the `--root-path` of a proxy.

    None, which is no route's, for a path with control characters: a pattern of Starlette's, and so of vLLM's
    router, also matches in front of a final line feed, where our comparisons do not. Whoever looks at a path
    asks here, so that all mean the same route.
    """
    path: str = scope["path"]
    if _CONTROL_CHARACTER.search(path):
        return None
    root: str = scope.get("root_path", "")
    inside = bool(root) and (path == root or path.startswith(f"{root}/"))
    return path[len(root) :] if inside else path


def request_state(scope: Scope) -> dict[str, Any]:
    """What middlewares leave for one another, and handlers see as `request.state`.

    `request_id`: str. `api_key`: name of the caller's API key; absent where none was asked for. `kv_cache`:
    the `RequestContext` of a request that reached vLLM's routes, which has the report of its generations.
    """
    state: dict[str, Any] = scope.setdefault("state", {})
    return state


class BodyTooLarge(Exception):
    """The body is longer than the limit."""


class ClientGone(Exception):
    """The client disconnected before its body was complete."""


async def read_body(scope: Scope, receive: Receive, limit: float = inf) -> bytes:
    """The body of an HTTP request; what a client declares too long is refused before it is read.

    Raises: BodyTooLarge for more than `limit` bytes, ClientGone.
    """
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isascii() and declared.isdigit() and float(declared) > limit:  # int() takes 4,300 digits
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
