"""The `kv_cache` object in answers, with a fake engine behind a small OpenAI-like application."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.testclient import TestClient

from rkv_vllm.server import engine_client
from rkv_vllm.server.access_log import AccessLog
from rkv_vllm.server.answer_headers import HEADERS
from rkv_vllm.server.answer_report import ReportingSend
from rkv_vllm.server.caller_rules import CallerRules
from rkv_vllm.server.engine_client import RequestContext
from rkv_vllm.server.middleware import KvCacheMiddleware
from rkv_vllm.server.protocol import KvCacheReport
from rkv_vllm.server.rules_by_api_key import RulesByApiKey

RESULT = {
    "budget": 256,
    "buffer": 128,
    "policy": "rkv",
    "protect": None,
    "compactions": 5,
    "evicted_tokens": 640,
    "peak_pages": 12,
    "pages_without_compaction": 29,
    "page_size": 32,
    "reason": None,
}
FULL = {**RESULT, "budget": None, "buffer": None, "policy": None, "compactions": 0, "reason": "full cache"}
PUBLIC = {key: value for key, value in RESULT.items() if value is not None}
#: As vLLM's routes give it to the engine.
PROMPT = {"prompt_token_ids": [1, 2, 3]}


class FakeEngine:
    """Yields three outputs; the last carries the engine's report. Remembers whether it was closed early."""

    def __init__(self, params: dict[str, Any] | None) -> None:
        self.params = params
        self.closed_early = False
        self.model_config = SimpleNamespace(max_model_len=2048)
        self.sampling_params: list[SimpleNamespace] = []

    async def generate(
        self, prompt: dict[str, Any], sampling_params: SimpleNamespace
    ) -> AsyncGenerator[SimpleNamespace, None]:
        self.sampling_params.append(sampling_params)
        try:
            for text in ("a", "}", None):
                params = self.params if text is None else None
                yield SimpleNamespace(text=text or "end", kv_transfer_params=params, finished=text is None)
        except GeneratorExit:
            self.closed_early = True
            raise


def params(xargs: dict[str, Any] | None = None) -> SimpleNamespace:
    return SimpleNamespace(extra_args=xargs, max_tokens=16)


def application(engine: FakeEngine, *, usage: bool = True) -> FastAPI:
    app = FastAPI()
    app.state.engine_client = engine

    async def chunks() -> AsyncGenerator[str, None]:
        async for output in app.state.engine_client.generate(PROMPT, params()):
            yield f"data: {json.dumps({'choices': [output.text]})}\n\n"
        if usage:
            yield f"data: {json.dumps({'usage': {'completion_tokens': 3}})}\n\n"
        yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Any:
        if (await request.json())["stream"]:
            return StreamingResponse(chunks(), media_type="text/event-stream")
        texts = [output.text async for output in app.state.engine_client.generate(PROMPT, params())]
        return JSONResponse({"choices": texts, "usage": {"completion_tokens": 3}})

    @app.post("/v1/other")
    async def other() -> Any:
        return JSONResponse(
            {"texts": [output.text async for output in app.state.engine_client.generate(PROMPT, params())]}
        )

    app.add_middleware(KvCacheMiddleware, rules=RulesByApiKey(CallerRules(), {}))
    return app


def stream(app: FastAPI) -> list[str]:
    answer = TestClient(app).post("/v1/chat/completions", json={"stream": True})
    return [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]


def test_usage_chunk_carries_the_report() -> None:
    """Only the usage chunk has it when there is one."""
    *chunks, usage, done = stream(application(FakeEngine({"rkv": RESULT})))
    assert done == "[DONE]"
    details = {"completion_tokens_details": {"kv_cache": PUBLIC}}
    assert json.loads(usage) == {"usage": {"completion_tokens": 3, **details}, "kv_cache": PUBLIC}
    assert [json.loads(chunk) for chunk in chunks] == [
        {"choices": ["a"]},
        {"choices": ["}"]},
        {"choices": ["end"]},
    ]


def test_last_choice_carries_the_report_without_usage() -> None:
    """A client that asks for no usage still gets it, with the last choice."""
    *chunks, last, done = stream(application(FakeEngine({"rkv": RESULT}), usage=False))
    assert done == "[DONE]"
    assert json.loads(last) == {"choices": ["end"], "kv_cache": PUBLIC}
    assert not any("kv_cache" in chunk for chunk in chunks)


def test_whole_answer_carries_the_report() -> None:
    """A JSON answer keeps what it had, and its length is that of the longer body."""
    answer = TestClient(application(FakeEngine({"rkv": RESULT}))).post(
        "/v1/chat/completions", json={"stream": False}
    )
    usage = {"completion_tokens": 3, "completion_tokens_details": {"kv_cache": PUBLIC}}
    assert answer.json() == {"choices": ["a", "}", "end"], "usage": usage, "kv_cache": PUBLIC}
    assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize("params", [None, {}, {"another_connector": 1}])
@pytest.mark.parametrize("streaming", [True, False])
def test_nothing_is_added_without_a_report(params: dict[str, Any] | None, streaming: bool) -> None:
    """An engine without compaction answers byte for byte as before."""
    body = {"stream": streaming}
    with_middleware = application(FakeEngine(params))
    without = application(FakeEngine(params))
    without.user_middleware.clear()
    ours, theirs = (
        TestClient(app).post("/v1/chat/completions", json=body) for app in (with_middleware, without)
    )
    assert ours.content == theirs.content


def test_the_bodies_of_other_paths_are_left_alone() -> None:
    """Their answers say it in headers; a stream's headers leave before there is anything to say."""
    app = application(FakeEngine({"rkv": RESULT}))
    stream(app)  # the engine is observed from here on
    answer = TestClient(app).post("/v1/other")
    assert answer.json() == {"texts": ["a", "}", "end"]}
    for path, body, number in (("/v1/other", {}, 4), ("/v1/chat/completions", {"stream": True}, 0)):
        headers = TestClient(app).post(path, json=body).headers
        found = {name: value for name, value in headers.items() if name.startswith("x-rkv")}
        assert found == dict(
            [
                ("x-rkv-budget", "256"),
                ("x-rkv-compactions", "5"),
                ("x-rkv-evicted-tokens", "640"),
                ("x-rkv-peak-pages", "12"),
            ][:number]
        )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/other"])
@pytest.mark.parametrize("streaming", [True, False])
def test_the_access_log_has_the_report(path: str, streaming: bool) -> None:
    """Proves that every request that generated leaves it there, whatever its client keeps of the answer."""
    lines = io.StringIO()
    logger = logging.Logger("access")
    logger.addHandler(logging.StreamHandler(lines))
    client = TestClient(AccessLog(application(FakeEngine({"rkv": RESULT})), logger))
    client.post(path, json={"stream": streaming})
    assert json.loads(lines.getvalue())["kv_cache"] == PUBLIC


def test_a_page_of_another_origin_may_read_the_headers() -> None:
    """Where vLLM lets it read the answer at all."""
    app = application(FakeEngine({"rkv": RESULT}))
    app.user_middleware.append(Middleware(CORSMiddleware, allow_origins=["*"]))  # the inner one, as in vLLM
    client = TestClient(app)
    for headers, exposed in (({}, None), ({"origin": "http://a"}, ", ".join(HEADERS))):
        answer = client.post("/v1/chat/completions", json={"stream": False}, headers=headers)
        assert answer.headers.get("access-control-expose-headers") == exposed


def test_requests_do_not_mix_up_their_reports() -> None:
    """Each answer carries its own request's report, also through one engine client."""
    engine = FakeEngine({"rkv": RESULT})
    app = application(engine)
    assert json.loads(stream(app)[-2])["kv_cache"]["budget"] == 256
    engine.params = {"rkv": FULL}
    assert json.loads(stream(app)[-2])["kv_cache"]["budget"] == "full"


def test_report_of_a_full_cache_says_why() -> None:
    """A request that was not compacted has a reason, and no buffer and no policy."""
    report = KvCacheReport.from_kv_transfer_params({"rkv": FULL})
    assert report is not None
    assert report.to_dict() == {
        "budget": "full",
        "compactions": 0,
        "evicted_tokens": 640,
        "peak_pages": 12,
        "pages_without_compaction": 29,
        "page_size": 32,
        "reason": "full cache",
    }


async def leave_early(engine: FakeEngine) -> None:
    engine_client.wrap(engine)
    with engine_client.request_context(RequestContext(CallerRules())):
        outputs = engine.generate(PROMPT, params())
    await anext(outputs)
    await outputs.aclose()


def test_closing_the_stream_reaches_the_engine() -> None:
    """A client that goes away aborts its request at once, not when the garbage collector comes by."""
    engine = FakeEngine({"rkv": RESULT})
    asyncio.run(leave_early(engine))
    assert engine.closed_early


def test_chunks_pass_untouched_until_the_report_is_there() -> None:
    """On the hot path a message goes on as the same object; a held chunk is never lost at a body's end."""
    sent: list[Any] = []
    context = RequestContext(CallerRules())

    async def record(message: Any) -> None:
        sent.append(message)

    async def drive() -> None:
        send = ReportingSend(record, context)
        start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream")],
        }
        chunk = {"type": "http.response.body", "body": b'data: {"a":1}\n\n', "more_body": True}
        await send(start)
        await send(chunk)
        assert sent == [start, chunk] and sent[1] is chunk
        context.keep({"rkv": RESULT})
        await send(chunk)
        await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
        assert len(sent) == 3
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(drive())
    assert [message.get("body") for message in sent[1:]] == [
        b'data: {"a":1}\n\n',
        b": keep-alive\n\n",
        b'data: {"a":1}\n\n',
        b"",
    ]


def test_a_refusal_is_an_error_of_the_request() -> None:
    """What the engine refused as too large for its pool becomes an error that says why, and no answer."""
    reason = "needs 70 pages of 32 tokens, and the whole pool has 12"
    app = application(FakeEngine({"rkv": FULL, "rkv_refusal": reason}))
    with pytest.raises(ValueError, match=reason):  # which vLLM's handlers answer with HTTP 400
        TestClient(app).post("/v1/chat/completions", json={"stream": False})


REPORTED: Any = {"kv_cache": PUBLIC}


@pytest.mark.parametrize(
    ("event", "data", "expected"),
    [
        (
            "response.completed",
            {"response": {"id": "\u00e9", "usage": {"output_tokens_details": {"reasoning_tokens": 1}}}},
            {
                "response": {
                    "id": "\u00e9",
                    "usage": {"output_tokens_details": {"reasoning_tokens": 1, **REPORTED}},
                    **REPORTED,
                }
            },
        ),
        (
            "message_delta",
            {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
            {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}, **REPORTED},
        ),
    ],
)
def test_the_event_that_ends_an_answer_carries_the_report(event: str, data: Any, expected: Any) -> None:
    """Proves that it goes into the response object, or into Anthropic's event, and that all other events
    pass as they are."""
    sent: list[Any] = []
    context = RequestContext(CallerRules())
    delta = b'event: response.output_text.delta\ndata: {"delta": "a"}\n\n'
    closing = f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()

    async def record(message: Any) -> None:
        sent.append(message)

    async def drive() -> None:
        send = ReportingSend(record, context)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": delta, "more_body": True})
        context.keep({"rkv": RESULT})
        await send({"type": "http.response.body", "body": delta, "more_body": True})
        await send({"type": "http.response.body", "body": closing, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(drive())
    _, first, second, last, end = sent
    assert first["body"] == second["body"] == delta
    name, text = last["body"].split(b"\ndata: ")
    assert name.decode() == f"event: {event}"
    assert json.loads(text) == expected
    assert end["body"] == b""
