"""The ramp of load under which answers are judged, on an engine that only counts steps."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ramp_accuracy import ClosedLoop, Reading, row_of

from rkv_vllm.evaluation.answers import Answer
from rkv_vllm.evaluation.engines import EngineError, Generation
from rkv_vllm.evaluation.settings import Setting
from rkv_vllm.evaluation.tasks import Decode, Problem
from rkv_vllm.server.protocol import KvCacheReport

AUTO = Setting("recency", 40, 8, auto=True)
TOKENS = 24


class Numbers:
    """A task whose answers are the questions; problems of a seed of its own are fillers."""

    max_tokens: int | None = TOKENS
    opens_thinking = judges_thinking = False
    decode: Decode | None = None

    def describe(self) -> dict[str, Any]:
        return {"name": "numbers"}

    def problems(self, count: int, seed: int) -> list[Problem]:
        return [Problem(str(i), f"{seed}:{i}", lambda answer, i=i: answer == str(i)) for i in range(count)]  # type: ignore[misc]


class CountingEngine:
    """Every request takes as many turns of the event loop as it has tokens; every third answer is wrong."""

    def __init__(self, used: Setting = AUTO) -> None:
        self.ages: dict[int, int] = {}
        self.seen: list[tuple[int, int]] = []  # in flight, and their different ages, at each end of a request
        self._asked, self._used = 0, used

    async def generate(
        self,
        prompt: Any,
        setting: Setting,
        seed: int,
        decode: Decode | None,
        *,
        max_tokens: int | None = None,
    ) -> Generation:
        self._asked += 1
        own, number = self._asked, prompt.partition(":")[2]
        try:
            for age in range(max_tokens or TOKENS):
                self.ages[own] = age
                await asyncio.sleep(0)
            self.seen.append((len(self.ages), len(set(self.ages.values()))))
        finally:
            del self.ages[own]
        report = KvCacheReport(
            budget="auto",
            min_budget=self._used.budget,
            full_cache_tokens=30 if int(number) % 2 else None,
            policy="recency",
            buffer=8,
            compactions=int(number) % 2,
            evicted_tokens=10 * (int(number) % 2),
            peak_pages=3,
            pages_without_compaction=3,
            page_size=16,
        )
        text = "?" if int(number) % 3 == 2 else number
        return Generation(text, False, 4, max_tokens or TOKENS, report, False)


def ramp(engine: Any, levels: list[int], problems: int) -> list[tuple[list[Answer], int]]:
    """Each level's answers, and how many requests had ended by its end."""

    async def run() -> list[tuple[list[Answer], int]]:
        found = []
        async with asyncio.TaskGroup() as group:
            loop = ClosedLoop(engine, AUTO, Numbers(), 0, group)
            for requests in levels:
                answers, _, _ = await loop.level(requests, Numbers().problems(problems, -1))
                found.append((answers, len(engine.seen)))
            loop.stop()
        return found

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reading, "now", lambda: Reading(0.0, 0.0, 0.0))


def test_a_level_is_kept_up_by_requests_of_all_ages() -> None:
    """Proves that as many requests as the level says are in flight while its problems are answered, of ages
    that differ, that all its answers come back in order, and that nothing stays in flight at the end."""
    engine = CountingEngine()
    found = ramp(engine, [4, 12, 4], 30)
    since = 0
    for level, (answers, ended) in zip((4, 12, 4), found, strict=True):
        assert [answer.problem for answer in answers] == [str(i) for i in range(30)]
        judged = engine.seen[max(ended - 30, since) : ended]
        assert {in_flight for in_flight, _ in judged} == {level}
        assert min(ages for _, ages in judged) >= min(level, 8)
        since = ended
    assert engine.ages == {}


def test_an_engine_that_does_otherwise_ends_the_ramp() -> None:
    """Proves that an error in one of the requests in flight ends all, and is seen."""
    with pytest.raises(ExceptionGroup) as raised:
        ramp(CountingEngine(Setting("recency", 48, 8, auto=True)), [2], 3)
    assert isinstance(raised.value.exceptions[0], EngineError)


def test_a_levels_row() -> None:
    """Proves what a level says: shares of its answers, rates between two readings, outcomes by problem."""
    [(answers, _)] = ramp(CountingEngine(), [2], 6)
    row = row_of(2, answers, Reading(10.0, 100.0, 1.0), Reading(14.0, 500.0, 3.0))
    assert (row["requests"], row["problems"], row["by_problem"]) == (2, 6, "110110")
    assert row["right"]["value"] == pytest.approx(4 / 6) and row["right"]["low"] < 4 / 6
    assert (row["tokens_per_second"], row["preemptions"]) == (100.0, 2)
    assert (row["never_compacted"], row["full_cache_tokens"], row["evicted_tokens"]) == (0.5, 30, 5)
