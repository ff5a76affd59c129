"""The report of a request as headers of its answer, for clients that keep no field they do not know."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from rkv_vllm.server.engine_client import RequestContext
from rkv_vllm.server.protocol import KvCacheReport

#: Header -> the member of the report that it has.
HEADERS = {
    "X-RKV-Budget": "budget",
    "X-RKV-Compactions": "compactions",
    "X-RKV-Evicted-Tokens": "evicted_tokens",
    "X-RKV-Peak-Pages": "peak_pages",
}


def with_report_headers(send: Send, context: RequestContext) -> Send:
    """ASGI `send` that adds the headers to an answer whose generations have ended before it begins.

    A stream's headers leave before its first token and have none of them. Where vLLM has allowed a page of
    another origin to read the answer, that page may read the headers too.
    """

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start" and (report := context.report) is not None:
            _add(MutableHeaders(scope=message), report)
        await send(message)

    return send_with_headers


def _add(headers: MutableHeaders, report: KvCacheReport) -> None:
    values = report.model_dump()
    for name, member in HEADERS.items():
        headers[name] = str(values[member])
    if "access-control-allow-origin" in headers:
        headers.append("Access-Control-Expose-Headers", ", ".join(HEADERS))
