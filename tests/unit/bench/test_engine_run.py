"""One row on an engine that is a list of steps."""

from __future__ import annotations

import time
from typing import Any

import llama_8b
import pytest

from rkv_vllm.bench.engine_run import LoadRun
from rkv_vllm.bench.load import LoadRequest
from rkv_vllm.bench.results import Measure
from rkv_vllm.bench.rows import Row
from rkv_vllm.bench.window import Spread, Step

STEADY = Row(name="steady", input=32, output=200, budget=64, buffer=16, concurrency=3)
BATCH = Row(name="batch", input=32, output=40, budget=64, buffer=16, batch=2)


class ListedEngine:
    """Every request gets a token in every step, a quarter of a second after the one before."""

    kind = "stock"
    facts = llama_8b.FACTS

    def __init__(self) -> None:
        self._left: dict[int, tuple[LoadRequest, int]] = {}
        self._at = time.monotonic()

    @property
    def unfinished(self) -> int:
        return len(self._left)

    def add(self, row: Row, request: LoadRequest) -> None:
        self._left[request.index] = request, request.output_tokens

    def step(self) -> tuple[Step, list[tuple[LoadRequest, bool]]]:
        self._at += 0.25
        step, news = Step(self._at, tokens=len(self._left), running=len(self._left), pool_use=0.5), []
        for index, (request, left) in list(self._left.items()):
            first, last = left == request.output_tokens, left == 1
            (step.first_tokens if first else step.gaps).append(0.25)
            if first or last:
                news.append((request, last))
            self._left[index] = request, left - 1
            if last:
                del self._left[index]
        return step, news

    def abort(self) -> bool:
        return True


@pytest.mark.parametrize("row", [STEADY, BATCH], ids=lambda row: row.name)
def test_times_of_tokens_are_kept_no_longer_than_a_window(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that each window has its times, and that what is kept of a long run does not grow by token."""
    engine: Any = ListedEngine()
    run = LoadRun(engine, row, Measure(windows=3, window_steps=50, settle_steps=16), None)
    run.run(None, stays=False)
    assert run.result.failure is None and len(run.result.windows) == 3
    for window in run.result.windows:
        assert window.token_seconds == Spread(p50=0.25, p99=0.25)
    assert sum(point.tokens_per_second for point in run.result.curve) > 0
    assert not any(step.gaps or step.first_tokens for step in run._steps)
