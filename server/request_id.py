"""A name for every request: the client's own in `X-Request-ID`, or a new one; every answer carries it."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkv_vllm.server.asgi import is_request, request_state
from rkv_vllm.server.errors import error_response

HEADER = "X-Request-ID"
#: What is taken from a client: fit for log lines, file names and vLLM's own ids.
ACCEPTED = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


class RequestId:
    """ASGI middleware: leaves the id for vLLM (whose ids, as in `chatcmpl-ID`, are made from it), in
    `request_state(scope)["request_id"]` and on the answer.

    An error that nothing has answered is answered here, where the answer still gets its id, and raised on.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        request_state(scope)["request_id"] = request_id
        headers = MutableHeaders(raw=list(scope["headers"]))
        headers[HEADER] = request_id
        scope = {**scope, "headers": headers.raw}
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            if not started and scope["type"] == "http":
                await error_response(500, "Internal server error.")(scope, receive, send_with_id)
            raise
