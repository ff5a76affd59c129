"""Adds the `kv_cache` object to the answers of vLLM's OpenAI endpoints.

The engine sends it with a request's last output (`RequestOutput.kv_transfer_params`). vLLM itself copies
that into whole answers, under its own name, and drops it from streams. `KvCacheReportMiddleware`, given to
vLLM's flag `--middleware`, takes it there and writes it into both. No JSON is parsed: the object is spliced
in before the closing brace, and a stream's chunks pass untouched until the engine has finished the request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkv_vllm.result import REFUSAL_KEY
from rkv_vllm.server.protocol import FIELD, KvCacheReport

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
END_OF_STREAM = b"data: [DONE]"


class ReportSlot:
    """Where the engine's report of one HTTP request is put.

    A request for several answers (`n`, or several prompts) keeps the report of the one that finished last,
    which is also what vLLM keeps of it.
    """

    def __init__(self) -> None:
        self.report: KvCacheReport | None = None


_slot: ContextVar[ReportSlot | None] = ContextVar("rkv_report_slot", default=None)


class KvCacheReportMiddleware:
    """ASGI middleware for an application whose `state.engine_client` is vLLM's engine client."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._observed: object = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(PATHS):
            await self.app(scope, receive, send)
            return
        self._observe(scope["app"].state.engine_client)
        slot = ReportSlot()
        token = _slot.set(slot)
        try:
            await self.app(scope, receive, ReportingSend(send, slot))
        finally:
            _slot.reset(token)

    def _observe(self, engine_client: Any) -> None:
        """Let every request that starts inside one of our calls leave its report in that call's slot.

        vLLM has no hook on finished outputs in the API server, so this one instance's `generate` is wrapped.
        """
        if engine_client is None or engine_client is self._observed:
            return
        engine_client.generate = _reporting(engine_client.generate)
        self._observed = engine_client


def _reporting(
    generate: Callable[..., AsyncGenerator[Any, None]],
) -> Callable[..., AsyncGenerator[Any, None]]:
    def generate_and_report(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs, slot = generate(*args, **kwargs), _slot.get()
        return outputs if slot is None else _leave_report(outputs, slot)

    return generate_and_report


async def _leave_report(outputs: AsyncGenerator[Any, None], slot: ReportSlot) -> AsyncGenerator[Any, None]:
    async with aclosing(outputs):  # closing this generator aborts the request, as it does without us
        async for output in outputs:
            if output.kv_transfer_params is not None:
                if reason := output.kv_transfer_params.get(REFUSAL_KEY):
                    raise ValueError(f"The request {reason}")  # vLLM answers HTTP 400
                report = KvCacheReport.from_kv_transfer_params(output.kv_transfer_params)
                slot.report = report or slot.report
            yield output


class ReportingSend:
    """ASGI `send` that adds the report to the body it passes on.

    A whole JSON answer is held until it is complete. Of a stream, from the moment the report is there, the
    newest chunk is held until the next shows whether it was the last one before `[DONE]`: with
    `stream_options.include_usage` that is the usage chunk, else the last choice's.
    """

    def __init__(self, send: Send, slot: ReportSlot) -> None:
        self._send = send
        self._slot = slot
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
        elif self._streaming and self._slot.report is not None:
            await self._on_chunk(message)
        else:
            await self._send(message)

    async def _on_start(self, message: Message) -> None:
        headers = MutableHeaders(raw=list(message["headers"]))
        content_type = headers.get("content-type", "")
        plain = message["status"] == 200 and "content-encoding" not in headers
        self._streaming = plain and content_type.startswith("text/event-stream")
        if plain and content_type.startswith("application/json") and self._slot.report is not None:
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
        if body.startswith(END_OF_STREAM):
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
        if self._slot.report is None or not text.endswith(b"}"):
            return body
        report = b',"%s":%s}' % (FIELD.encode(), self._slot.report.to_json())
        return text[:-1] + report + body[len(text) :]
