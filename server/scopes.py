"""What the middlewares share of an ASGI scope."""

from __future__ import annotations

from typing import Any

from starlette.types import Scope


def is_request(scope: Scope) -> bool:
    """Whether this is an HTTP request or a WebSocket, and not the application's start and end."""
    return scope["type"] in ("http", "websocket")


def route_path(scope: Scope) -> str:
    """The path as the application's routes see it: without the `--root-path` of a proxy."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    inside = bool(root) and (path == root or path.startswith(f"{root}/"))
    return path[len(root) :] if inside else path


def request_state(scope: Scope) -> dict[str, Any]:
    """What middlewares leave for one another, and handlers see as `request.state`.

    `request_id`: str. `api_key`: name of the caller's API key; absent where none was asked for.
    """
    state: dict[str, Any] = scope.setdefault("state", {})
    return state
