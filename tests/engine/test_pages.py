"""Whole pages leave: the same guarantees as by token, on one engine with a small pool."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
import texts
from engine_process import ABOVE_ANY_LENGTH, PAGE_SIZE, Ask, Engine, Run, Settings
from hf_reference import HfReference
from support.identical import assert_alike, assert_bit_identical

PAGES = 31
TOKENS = 140
#: Prompt, budget, buffer, policy.
CASES = {
    "numbers": (texts.multiples(7), 64, 24, "rkv"),
    "prose": (texts.KING, 96, 8, "recency"),
    "countdown": (texts.COUNTDOWN, 64, 24, "rkv"),
    "long prompt": (texts.squares(16), 80, 40, "rkv"),
}


@pytest.fixture(scope="module")
def paged(start_engine: Callable[[Settings], Engine]) -> Engine:
    return start_engine(Settings(granularity="page", pages=PAGES))


@pytest.fixture(scope="module")
def asks(encode: texts.Encode) -> dict[str, Ask]:
    return {
        case: Ask(encode(prompt), TOKENS, {"rkv_budget": budget, "rkv_buffer": buffer, "rkv_policy": policy})
        for case, (prompt, budget, buffer, policy) in CASES.items()
    }


@pytest.fixture(scope="module")
def run(paged: Engine, asks: dict[str, Ask]) -> Run:
    return paged.run(list(asks.values()))


def test_budget_above_the_length_is_stock(paged: Engine, stock: Engine, encode: texts.Encode) -> None:
    """Requests that never reach their budget get stock's tokens and logprobs to the bit."""
    prompts = [encode(text) for text in (texts.multiples(7), texts.COUNTDOWN)]
    expected = stock.submit([Ask(prompt, 60) for prompt in prompts])
    found = paged.run([Ask(prompt, 60, {"rkv_budget": ABOVE_ANY_LENGTH}) for prompt in prompts])

    assert_bit_identical(found.answers, expected.result().answers)
    assert not any(step.compacted for step in found.steps)


def test_generation_equals_transformers(reference: HfReference, asks: dict[str, Ask], run: Run) -> None:
    """Every token is the one that transformers predicts with the same pages cut out of its cache."""
    for case, ask, answer in zip(asks, asks.values(), run.answers, strict=True):
        _, budget, buffer, policy = CASES[case]
        teaching = reference.teach(
            ask.prompt, answer.tokens, budget=budget, buffer=buffer, policy=policy, page_size=PAGE_SIZE
        )
        assert len(teaching.compacted_at) == answer.result["compactions"] >= 2
        assert teaching.logprobs.argmax(dim=-1).tolist() == answer.tokens
        assert teaching.worst_difference(answer.tokens, answer.logprobs) < 1e-3


def test_820_tokens_within_a_budget_of_256(paged: Engine, encode: texts.Encode) -> None:
    """A request of 820 tokens never holds more than budget + buffer and one page, and says what happened."""
    ask = Ask(encode(texts.squares(40))[:380], 440, {"rkv_budget": 256, "rkv_buffer": 128})
    alone = paged.run([ask])

    assert [step.compacted[0] for step in alone.steps if step.compacted] == [384] * 4
    assert max(step.pages[0] for step in alone.steps) <= (256 + 128) // PAGE_SIZE + 1
    assert [step.pages[0] for step in alone.steps][-1] <= (256 + 128) // PAGE_SIZE
    result = alone.answers[0].result
    assert (result["compactions"], result["evicted_tokens"]) == (4, 4 * 128)
    assert result["peak_pages"] == max(step.pages[0] for step in alone.steps)
    assert result["pages_without_compaction"] == ceil(819 / PAGE_SIZE)


def test_preempted_requests_replay_their_evictions(
    paged: Engine, asks: dict[str, Ask], run: Run, encode: texts.Encode
) -> None:
    """Requests that lose all pages after an eviction end as in a run without preemption."""
    growing = [Ask(encode(texts.multiples(n)), 130, {"rkv_budget": 0}) for n in (3, 4, 6, 9)]
    crowd = paged.run([*growing, *list(asks.values())[:3]])

    assert run.preemptions() == 0
    preempted = {index - len(growing) for step in crowd.steps for index in step.preempted}
    again = [i for i in preempted if i >= 0 and crowd.compactions(i + len(growing)) > run.compactions(i)]
    assert again, "no request was preempted after an eviction"
    assert_alike(crowd.answers[len(growing) :], run.answers[:3])
    for answer, expected in zip(crowd.answers[len(growing) :], run.answers[:3], strict=True):
        assert answer.result["evicted_tokens"] == expected.result["evicted_tokens"]
