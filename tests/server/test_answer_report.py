"""The `kv_cache` object in answers, with a fake engine behind a small OpenAI-like application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from rkv_vllm.server import engine_client
from rkv_vllm.server.answer_report import ReportingSend
from rkv_vllm.server.caller_rules import CallerRules, RulesByApiKey
from rkv_vllm.server.engine_client import RequestContext
from rkv_vllm.server.middleware import KvCacheMiddleware
from rkv_vllm.server.protocol import KvCacheReport, combined

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
PUBLIC = {key: value for key, value in RESULT.items() if key != "page_size" and value is not None}
#: As vLLM's routes give it to the engine.
PROMPT = {"prompt_token_ids": [1, 2, 3]}


class FakeEngine:
    """Yields three outputs; the last carries the engine's report. Remembers whether it was closed early."""

    def __init__(self, params: dict[str, Any] | None) -> None:
        self.params = params
        self.closed_early = False
        self.output_processor = FakeOutputProcessor()
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


class FakeOutputProcessor:
    """The part of vLLM's output processor with which the results of several answers are added up."""

    def __init__(self) -> None:
        self.request_states: dict[str, SimpleNamespace] = {}
        self.processed: list[list[SimpleNamespace]] = []

    def process_outputs(self, engine_core_outputs: list[SimpleNamespace]) -> None:
        self.processed.append(engine_core_outputs)


def params(xargs: dict[str, Any] | None = None) -> SimpleNamespace:
    return SimpleNamespace(extra_args=xargs, max_tokens=16)


def application(engine: FakeEngine, *, usage: bool = True) -> FastAPI:
    app = FastAPI()
    app.state.engine_client = engine

    async def chunks() -> AsyncGenerator[str, None]:
        async for output in app.state.engine_client.generate(PROMPT, params()):
            yield f"data: {json.dumps({'choices': [output.text]})}\n\n"
        if usage:
            yield f"data: {json.dumps({'usage': {}})}\n\n"
        yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> Any:
        if (await request.json())["stream"]:
            return StreamingResponse(chunks(), media_type="text/event-stream")
        texts = [output.text async for output in app.state.engine_client.generate(PROMPT, params())]
        return JSONResponse({"choices": texts, "usage": {"n": 3}})

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
    assert json.loads(usage) == {"usage": {}, "kv_cache": PUBLIC}
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
    assert answer.json() == {"choices": ["a", "}", "end"], "usage": {"n": 3}, "kv_cache": PUBLIC}
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


def test_other_paths_are_left_alone() -> None:
    """Only OpenAI's generation endpoints get the object."""
    app = application(FakeEngine({"rkv": RESULT}))
    stream(app)  # the engine is observed from here on
    assert TestClient(app).post("/v1/other").json() == {"texts": ["a", "}", "end"]}


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
    assert json.loads(report.to_json()) == {
        "budget": "full",
        "compactions": 0,
        "evicted_tokens": 640,
        "peak_pages": 12,
        "pages_without_compaction": 29,
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


def test_several_reports_are_added_up() -> None:
    """Proves that numbers are sums, and that a reason stays only where nothing at all was compacted."""
    one = KvCacheReport.from_kv_transfer_params({"rkv": RESULT})
    none = KvCacheReport.from_kv_transfer_params({"rkv": {**RESULT, "compactions": 0, "reason": "short"}})
    assert one is not None and none is not None
    both = json.loads(combined([none, one]).to_json())
    assert both == {
        **{key: 2 * PUBLIC[key] for key in ("evicted_tokens", "peak_pages", "pages_without_compaction")},
        **{key: PUBLIC[key] for key in ("budget", "buffer", "policy", "compactions")},
        "sequences": 2,
    }
    assert combined([none, none]).reason == "short"
    assert combined([combined([one, none]), one]) == combined([one, combined([none, one])])


def test_the_answers_of_one_request_are_added_up_where_they_finish() -> None:
    """Proves that the last of several answers carries the sum of all; another request's are left alone.

    An answer may report more than once, as one with stop strings does: its newest report counts.
    """
    engine = FakeEngine(None)
    processor = engine.output_processor
    parent = FakeOutputProcessor()  # anything that can be referred to weakly, as vLLM's ParentRequest can
    for name in ("0_r", "1_r"):
        processor.request_states[name] = SimpleNamespace(parent_req=parent)
    processor.request_states["alone"] = SimpleNamespace(parent_req=None)
    engine_client.wrap(engine)

    def output(name: str, compactions: int) -> SimpleNamespace:
        result = {**RESULT, "compactions": compactions}
        return SimpleNamespace(request_id=name, kv_transfer_params={"rkv": result})

    unfinished = SimpleNamespace(request_id="0_r", kv_transfer_params=None)
    outputs = [output("0_r", 1), output("0_r", 2), output("alone", 7), unfinished, output("1_r", 40)]
    processor.process_outputs(outputs)
    assert processor.processed == [outputs]
    seen = [o.kv_transfer_params["rkv"]["compactions"] for o in outputs if o.kv_transfer_params]
    assert seen == [1, 2, 7, 42]
    report = KvCacheReport.from_kv_transfer_params(outputs[-1].kv_transfer_params)
    assert report is not None and report.sequences == 2
    assert outputs[-1].kv_transfer_params["rkv"]["page_size"] == RESULT["page_size"]


def test_the_event_that_completes_a_response_carries_the_report() -> None:
    """Proves that it goes into the response object, and that all other events pass as they are."""
    sent: list[Any] = []
    context = RequestContext(CallerRules())
    delta = b'event: response.output_text.delta\ndata: {"delta": "a"}\n\n'
    completed = b'event: response.completed\ndata: {"response": {"id": "\xc3\xa9"}, "type": "x"}\n\n'

    async def record(message: Any) -> None:
        sent.append(message)

    async def drive() -> None:
        send = ReportingSend(record, context)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": delta, "more_body": True})
        context.keep({"rkv": RESULT})
        await send({"type": "http.response.body", "body": delta, "more_body": True})
        await send({"type": "http.response.body", "body": completed, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(drive())
    _, first, second, last, end = sent
    assert first["body"] == second["body"] == delta
    name, data = last["body"].split(b"\ndata: ")
    assert name == b"event: response.completed"
    assert json.loads(data) == {"response": {"id": "\u00e9", "kv_cache": PUBLIC}, "type": "x"}
    assert end["body"] == b""
