"""What is sent to a server and read from its answers; the server is a function."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from rkv_vllm.evaluation.engines import EngineError, Generation, Prompt, Sampling, ServerEngine
from rkv_vllm.evaluation.settings import FULL_CACHE, Setting

RKV = Setting("rkv", 512, 64)
REPORT = {
    "budget": 512,
    "policy": "rkv",
    "buffer": 64,
    "compactions": 3,
    "evicted_tokens": 192,
    "peak_pages": 20,
    "pages_without_compaction": 29,
    "page_size": 16,
}
USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}


def ask(
    reply: dict[str, Any] | Callable[[httpx.Request], httpx.Response],
    prompt: Prompt = "2 + 2?",
    setting: Setting = RKV,
    sampling: Sampling | None = None,
) -> tuple[Generation, str, dict[str, Any]]:
    """Returns the generation, and path and body of the request."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return reply(request) if callable(reply) else httpx.Response(200, json=reply)

    async def generate() -> Generation:
        transport = httpx.MockTransport(answer)
        async with AsyncOpenAI(
            base_url="http://server/v1",
            api_key="unused",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            engine = ServerEngine(client, "served", 100, sampling or Sampling(0.0, 1.0, None, True), {})
            return await engine.generate(prompt, setting, 5, None)

    generation = asyncio.run(generate())
    [request] = seen
    return generation, request.url.path, json.loads(request.content)


def chat(content: str | None, finish_reason: str = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "served", "choices": [choice]} | {
        "usage": USAGE,
        **more,
    }


def completion(text: str, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": None}
    return {"id": "1", "object": "text_completion", "created": 0, "model": "served", "choices": [choice]} | {
        "usage": USAGE,
        **more,
    }


def test_text_goes_into_a_chat() -> None:
    """Proves that a question is a user's message with the setting beside it, and that the report is read."""
    found, path, body = ask(chat("4", kv_cache=REPORT))
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "2 + 2?"}]
    assert body["vllm_xargs"] == {
        "rkv_budget": 512,
        "rkv_buffer": 64,
        "rkv_policy": "rkv",
        "rkv_protect": 0,
    }
    assert body["temperature"] == 0 and "seed" not in body
    assert (found.output, found.truncated, found.prompt_tokens, found.output_tokens) == ("4", False, 7, 9)
    assert found.report.evicted_tokens == 192


def test_token_ids_keep_their_special_tokens() -> None:
    """Proves that a task with tokens of its own gets the text it can read, and all the room there is."""
    found, path, body = ask(completion("</think>4", kv_cache=REPORT), prompt=[1, 2, 3])
    assert (path, body["prompt"]) == ("/v1/completions", [1, 2, 3])
    assert (body["skip_special_tokens"], body["max_tokens"]) == (False, 97)
    assert found.output == "</think>4"


def test_without_a_template_and_with_sampling() -> None:
    """Proves that the question is sent as it is, with temperature, top-p, seed and limit."""
    _, path, body = ask(completion("4", kv_cache=REPORT), sampling=Sampling(0.6, 0.95, 50, False))
    assert (path, body["prompt"]) == ("/v1/completions", "2 + 2?")
    assert (body["temperature"], body["top_p"], body["seed"], body["max_tokens"]) == (0.6, 0.95, 5, 50)


def test_an_answer_without_content_is_empty() -> None:
    """Proves that thinking that a reasoning parser set aside, and that never ended, is no answer."""
    found, _, _ = ask(chat(None, "length", kv_cache=REPORT))
    assert (found.output, found.truncated) == ("", True)


def test_vllms_own_server_reports_too() -> None:
    """Proves that its name for the report is known."""
    full = {**REPORT, "budget": None, "policy": None, "buffer": None, "reason": "full cache"}
    found, _, _ = ask(chat("4", kv_transfer_params={"rkv": full}), setting=FULL_CACHE)
    assert found.report.budget == "full"


def test_a_server_without_reports_is_refused() -> None:
    """Proves that a server on which R-KV is not on cannot be measured as if it were."""
    with pytest.raises(EngineError, match="R-KV is not on there"):
        ask(chat("4"))


def test_what_the_server_refuses_is_shown() -> None:
    """Proves that the server's own words reach the user."""
    error = {"error": {"message": "budget is 512, which is not allowed here", "type": "x", "code": 400}}
    with pytest.raises(EngineError, match="512, which is not allowed"):
        ask(lambda request: httpx.Response(400, json=error))
