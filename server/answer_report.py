"""Writes the `kv_cache` object into answers as they are sent.

vLLM copies the engine's report into whole answers, under a name of its own, and drops it from streams. Here
it goes into both, once: a stream's events pass untouched until the engine has finished the request.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from rkv_vllm.server.engine_client import RequestContext
from rkv_vllm.server.protocol import FIELD

END_OF_CHUNKS = b"data: [DONE]"
#: How the events begin that end an answer in streams whose events have names: of OpenAI's responses and of
#: Anthropic's messages. The latter is the last one that Anthropic's clients give to their callers as it came.
CLOSING_EVENTS = (b"event: response.completed\n", b"event: message_delta\n")


class ReportingSend:
    """ASGI `send` that adds the report to the body it passes on.

    A whole JSON answer is held until it is complete. Of a stream of chunks, from the moment a report is
    there, the newest is held until the next shows whether it was the last one before `[DONE]`: with
    `stream_options.include_usage` that is the usage chunk, else the last choice's. Of a stream of named
    events, one of `CLOSING_EVENTS` has it.
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
            await self._on_event(message)
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

    async def _on_event(self, message: Message) -> None:
        body = message.get("body", b"")
        if body.startswith(CLOSING_EVENTS):
            message = {**message, "body": self._in_event(body)}
        elif body.startswith(END_OF_CHUNKS):
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
        await self._send({**held, "body": self._in_event(held["body"])} if last else held)

    def _in_event(self, event: bytes) -> bytes:
        name, data, answer = event.partition(b"data: ")
        return name + data + self._with_report(answer) + b"\n\n"

    def _with_report(self, body: bytes) -> bytes:
        """`body`, a JSON object that ends an answer, with the report in the answer."""
        report = self._context.report
        assert report is not None
        content = json.loads(body)
        add_report(content.get("response", content), report.to_dict())
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def add_report(answer: dict[str, Any], report: dict[str, Any]) -> None:
    """Put the report beside `usage`, and into its details of output, which more of OpenAI's clients keep.

    Anthropic's usage has no such details: they would have to hold a number that vLLM does not count.
    """
    answer[FIELD] = report
    usage = answer.get("usage") or {}
    if "completion_tokens" in usage:
        details = usage.get("completion_tokens_details") or {}
        usage["completion_tokens_details"] = {**details, FIELD: report}
    elif "output_tokens_details" in usage:
        usage["output_tokens_details"] = {**usage["output_tokens_details"], FIELD: report}
