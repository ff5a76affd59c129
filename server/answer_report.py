"""Writes the `kv_cache` object into answers as they are sent.

vLLM copies the engine's report into whole answers, under a name of its own, and drops it from streams. Here
it goes into both. Little JSON is parsed: the object is spliced in before a closing brace, and a stream's
chunks pass untouched until the engine has finished the request.
"""

from __future__ import annotations

import json

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from rkv_vllm.server.engine_client import RequestContext
from rkv_vllm.server.protocol import FIELD

END_OF_STREAM = b"data: [DONE]"
#: How the last event of a streamed response begins; the response object is a member of its data.
RESPONSE_COMPLETED = b"event: response.completed\ndata: "


class ReportingSend:
    """ASGI `send` that adds the report to the body it passes on.

    A whole JSON answer is held until it is complete. Of a stream of chunks, from the moment a report is
    there, the newest is held until the next shows whether it was the last one before `[DONE]`: with
    `stream_options.include_usage` that is the usage chunk, else the last choice's. Of a stream of response
    events, the one that completes the response has it in the response object.
    """

    def __init__(self, send: Send, context: RequestContext) -> None:
        self._send = send
        self._context = context
        self._start: Message | None = None  # of a JSON answer, until its length is known
        self._body = b""
        self._streaming = False
        self._held: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._on_start(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is not None:
            await self._on_json(message)
        elif self._streaming and self._context.report is not None:
            await self._on_chunk(message)
        else:
            await self._send(message)

    async def _on_start(self, message: Message) -> None:
        headers = MutableHeaders(raw=list(message["headers"]))
        content_type = headers.get("content-type", "")
        plain = message["status"] == 200 and "content-encoding" not in headers
        self._streaming = plain and content_type.startswith("text/event-stream")
        if plain and content_type.startswith("application/json") and self._context.report is not None:
            self._start = message
        else:
            await self._send(message)

    async def _on_json(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None
        body = self._with_report(self._body)
        headers = MutableHeaders(raw=list(self._start["headers"]))
        headers["content-length"] = str(len(body))
        await self._send({**self._start, "headers": headers.raw})
        await self._send({**message, "body": body})

    async def _on_chunk(self, message: Message) -> None:
        body = message.get("body", b"")
        if body.startswith(RESPONSE_COMPLETED):
            message = {**message, "body": self._with_report_in_response(body)}
        elif body.startswith(END_OF_STREAM):
            await self._release(last=True)
        elif body.startswith(b"data: {") and message.get("more_body", False):
            await self._release(last=False)
            self._held = message
            return
        elif not message.get("more_body", False):
            await self._release(last=False)
        await self._send(message)

    async def _release(self, *, last: bool) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        await self._send({**held, "body": self._with_report(held["body"])} if last else held)

    def _with_report(self, body: bytes) -> bytes:
        """`body`, which ends in a JSON object of at least one member, with the report as its last one."""
        text = body.rstrip()
        report = self._context.report
        if report is None or not text.endswith(b"}"):
            return body
        return text[:-1] + b',"%s":%s}' % (FIELD.encode(), report.to_json()) + body[len(text) :]

    def _with_report_in_response(self, body: bytes) -> bytes:
        report = self._context.report
        assert report is not None
        event = json.loads(body.removeprefix(RESPONSE_COMPLETED))
        event["response"][FIELD] = json.loads(report.to_json())
        return RESPONSE_COMPLETED + json.dumps(event).encode() + b"\n\n"
