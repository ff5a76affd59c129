"""Errors in OpenAI's envelope, with vLLM's names for their types."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: int | str | None = None,
    type: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An answer that OpenAI's clients read as an error.

    Args:
        status: HTTP status.
        message: one sentence for the caller.
        param: the field of the request that is at fault, as in `kv_cache.budget`.
        code: default: the status, as vLLM has it.
        type: default: vLLM's name for the status.
        headers: further headers.
    """
    error = {
        "message": message,
        "type": type or TYPES[status],
        "param": param,
        "code": status if code is None else code,
    }
    return JSONResponse({"error": error}, status, headers=dict(headers or {}))


def no_such_route() -> JSONResponse:
    """The answer to a path that leads nowhere."""
    return error_response(404, "There is no such route.")
