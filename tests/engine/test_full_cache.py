"""With nothing to evict, R-KV's classes must not change one bit of what vLLM computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import identity_scheduler
import pytest
import texts
from engine_process import ABOVE_ANY_LENGTH, Ask, Engine, Run, Settings
from support.identical import assert_bit_identical

FULL = {"rkv_budget": ABOVE_ANY_LENGTH}


@pytest.fixture(scope="module")
def asks(encode: texts.Encode) -> Callable[[Mapping[str, Any]], list[Ask]]:
    # The last prompt is prefilled in two chunks.
    prompts = [texts.multiples(7), texts.COUNTDOWN, texts.KING, texts.squares(40)]
    tokens = [encode(prompt) for prompt in prompts]
    assert len(tokens[-1]) > 512
    return lambda extra: [Ask(prompt, 70 + index, extra) for index, prompt in enumerate(tokens)]


@pytest.fixture(scope="module")
def stock_run(stock: Engine, asks: Callable[[Mapping[str, Any]], list[Ask]]) -> Run:
    return stock.run(asks({}))


def test_budget_above_the_length_is_stock(
    rkv: Engine, asks: Callable[[Mapping[str, Any]], list[Ask]], stock_run: Run
) -> None:
    """Requests that never reach their budget get stock's tokens and logprobs to the bit."""
    run = rkv.run(asks(FULL))

    assert_bit_identical(run.answers, stock_run.answers)
    assert not any(step.compacted for step in run.steps)


def test_identity_compaction_is_stock(
    start_engine: Callable[[Settings], Engine],
    asks: Callable[[Mapping[str, Any]], list[Ask]],
    stock_run: Run,
) -> None:
    """Moving every request's whole KV into other pages every 16 tokens changes no bit of the output."""
    engine = start_engine(Settings(scheduler="identity_scheduler.IdentityScheduler"))
    run = engine.run(asks(FULL))

    assert_bit_identical(run.answers, stock_run.answers)
    for index, answer in enumerate(run.answers):
        assert run.compactions(index) == (len(answer.tokens) - 2) // identity_scheduler.EVERY + 1
