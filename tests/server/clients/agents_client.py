"""OpenAI's Agents SDK: the report in what it keeps of usage, streamed or not."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

URL, MODEL = sys.argv[1:]
PROMPT = "Count from one to a hundred, in words. " * 4
SETTINGS = ModelSettings(
    include_usage=True,
    preserve_raw_usage=True,
    extra_body={
        "kv_cache": {"budget": 32, "buffer": 16},
        "structured_outputs": {"regex": "[0-9]{30}"},  # the SDK takes an answer that was cut off for an error
    },
)


async def run(model: Any) -> tuple[Any, Any]:
    """What is kept of a whole answer, and of a streamed one."""
    agent = Agent(name="counter", model=model, model_settings=SETTINGS)
    whole = await Runner.run(agent, PROMPT)
    streamed = Runner.run_streamed(agent, PROMPT)
    async for _ in streamed.stream_events():
        pass
    return whole.raw_responses[-1], streamed.raw_responses[-1]


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="any")
    chats = await run(OpenAIChatCompletionsModel(MODEL, client))
    responses = await run(OpenAIResponsesModel(MODEL, client))
    of_chats = [kept.raw_usage["completion_tokens_details"]["kv_cache"] for kept in chats]
    of_responses = [kept.usage.output_tokens_details.kv_cache for kept in responses]
    names = ("chat", "streamed chat", "response", "streamed response")
    print(json.dumps(dict(zip(names, [*of_chats, *of_responses], strict=True))))


asyncio.run(main())
