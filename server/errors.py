"""Errors in OpenAI's envelope, with vLLM's names for their types, which Anthropic's clients read as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rkv_vllm.server.asgi import route_path

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
#: How the routes of Anthropic's API begin.
ANTHROPIC = "/v1/messages"


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An ASGI application that answers with an error.

    Attributes:
        status: HTTP status.
        error: members of the envelope.
        headers: of the answer.
    """

    status: int
    error: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = JSONResponse(self._content(scope), self.status, headers=dict(self.headers))
        await response(scope, receive, send)

    def event(self, scope: Scope) -> bytes:
        """The error as the last event of a stream that has begun."""
        name = b"event: error\n" if _is_anthropic(scope) else b""
        return name + b"data: " + json.dumps(self._content(scope)).encode() + b"\n\n"

    def _content(self, scope: Scope) -> dict[str, Any]:
        return {"type": "error", "error": self.error} if _is_anthropic(scope) else {"error": self.error}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> ErrorResponse:
    """An answer that clients read as an error.

    Args:
        status: HTTP status.
        message: one sentence for the caller.
        param: the field of the request that is at fault, as in `kv_cache.budget`.
        headers: further headers.
    """
    error = {"message": message, "type": TYPES[status], "param": param, "code": status}
    return ErrorResponse(status, error, dict(headers or {}))


def no_such_route() -> ErrorResponse:
    """The answer to a path that leads nowhere."""
    return error_response(404, "There is no such route.")


def _is_anthropic(scope: Scope) -> bool:
    path = route_path(scope)
    return path is not None and (path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/"))
