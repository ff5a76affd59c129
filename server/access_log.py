"""One line of JSON a request, on standard output."""

from __future__ import annotations

import json
import logging
import os
import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkv_vllm.server.asgi import is_request, request_state, route_path
from rkv_vllm.settings.error_text import cut

#: Asked every few seconds by whatever watches the server.
PROBES = frozenset({"/health", "/ready"})
#: Most characters of what a client chose; a path may be as long as uvicorn lets a request's head be.
MOST_CHARACTERS = 256


def access_logger() -> logging.Logger:
    """The logger of the lines. It writes to the process's standard output, past vLLM's log settings, and each
    line in one piece, so that the lines of several API servers do not mix."""
    logger = logging.getLogger("rkv_vllm.access")
    if not logger.handlers:
        handler = logging.StreamHandler(os.fdopen(os.dup(1), "w", buffering=1))
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class AccessLog:
    """ASGI middleware: logs what was asked for, what came of it, and never a key, a query or a body.

    `key` is the name of the API key, null where none was accepted; `status` is null where nothing was
    answered; `disconnected`: the client left before its answer was complete; bytes are those of bodies;
    `kv_cache` is the report as in answers, null where no generation has ended.
    """

    def __init__(self, app: ASGIApp, logger: logging.Logger) -> None:
        self.app = app
        self._logger = logger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope) or route_path(scope) in PROBES:
            await self.app(scope, receive, send)
            return
        seen: dict[str, Any] = {"status": None, "disconnected": False, "bytes_in": 0, "bytes_out": 0}
        complete = False

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                seen["bytes_in"] += len(message.get("body", b""))
            elif message["type"] == "http.disconnect" and not complete:
                seen["disconnected"] = True
            return message

        async def watched_send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
            elif message["type"] == "http.response.body":
                seen["bytes_out"] += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        began, started = datetime.now(UTC), time.perf_counter()
        state = request_state(scope)  # before the application runs, which is given copies of the scope
        try:
            await self.app(scope, watched_receive, watched_send)
        finally:
            context = state.get("kv_cache")
            report = None if context is None else context.report
            line = {
                "time": began.isoformat(timespec="milliseconds"),
                "method": cut(scope.get("method", "WEBSOCKET"), MOST_CHARACTERS),
                "path": cut(scope["path"], MOST_CHARACTERS),
                "status": seen.pop("status"),
                "duration_ms": round((time.perf_counter() - started) * 1000, 1),
                "request_id": state.get("request_id"),
                "client": cut(scope["client"][0], MOST_CHARACTERS) if scope.get("client") else None,
                "key": state.get("api_key"),
                **seen,
                "kv_cache": None if report is None else report.to_dict(),
            }
            self._logger.info(json.dumps(line))
