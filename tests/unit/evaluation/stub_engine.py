"""An engine that answers from a list and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rkv_vllm.evaluation.engines import EngineError, Generation, Prompt
from rkv_vllm.evaluation.settings import FULL_CACHE, Setting
from rkv_vllm.evaluation.tasks import Decode
from rkv_vllm.server.protocol import KvCacheReport

#: Tokens of every prompt, and of an answer where the test does not say.
PROMPT_TOKENS, OUTPUT_TOKENS = 20, 80
PAGE_SIZE = 10


def report_of(setting: Setting, tokens: int = PROMPT_TOKENS + OUTPUT_TOKENS) -> KvCacheReport:
    """What an engine says about a request of this length."""
    pages = -(-tokens // PAGE_SIZE)
    if setting == FULL_CACHE:
        return KvCacheReport(
            budget="full",
            compactions=0,
            evicted_tokens=0,
            peak_pages=pages,
            pages_without_compaction=pages,
            page_size=PAGE_SIZE,
        )
    evicted = max(0, tokens - setting.budget)
    return KvCacheReport(
        budget="auto" if setting.auto else setting.budget,
        min_budget=setting.budget if setting.auto else None,
        full_cache_tokens=setting.budget + setting.buffer if setting.auto and evicted else None,
        policy=setting.policy,
        buffer=setting.buffer,
        compactions=int(evicted > 0),
        evicted_tokens=evicted,
        peak_pages=-(-min(tokens, setting.budget + setting.buffer) // PAGE_SIZE),
        pages_without_compaction=pages,
        page_size=PAGE_SIZE,
    )


class StubEngine:
    """`answer` gives the output of a prompt under a setting; after `fails_after` requests every one fails."""

    def __init__(
        self,
        answer: Callable[[Prompt, Setting], str],
        *,
        truncated: bool = False,
        opened_thinking: bool = False,
        fails_after: int | None = None,
        used: Setting | None = None,
    ) -> None:
        self.facts: dict[str, Any] = {"versions": {}}
        self.asked: list[tuple[Prompt, Setting, int]] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._answer, self._truncated, self._opened = answer, truncated, opened_thinking
        self._fails_after, self._used = fails_after, used

    async def generate(
        self, prompt: Prompt, setting: Setting, seed: int, decode: Decode | None
    ) -> Generation:
        if self._fails_after is not None and len(self.asked) >= self._fails_after:
            raise EngineError("out of order")
        self.asked.append((prompt, setting, seed))
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        await asyncio.sleep(0)
        self._in_flight -= 1
        return Generation(
            output=self._answer(prompt, setting),
            truncated=self._truncated,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            report=report_of(self._used or setting),
            opened_thinking=self._opened,
        )
