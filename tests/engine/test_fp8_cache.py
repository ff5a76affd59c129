"""A cache in FP8: the same guarantees as in the model's dtype, against stock vLLM with the same cache."""

from __future__ import annotations

from collections.abc import Callable

import identity_scheduler
import pytest
import texts
import torch
from engine_process import ABOVE_ANY_LENGTH, PAGE_SIZE, Ask, Engine, Run, Settings
from support.identical import assert_bit_identical

from rkv_vllm.settings.config import POLICY_NAMES

pytestmark = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM's CPU attention needs AVX-512 or AMX to keep FP8",
)
TOKENS = 90


@pytest.fixture(scope="module")
def prompts(encode: texts.Encode) -> list[list[int]]:
    return [list(encode(text)) for text in (texts.multiples(7), texts.COUNTDOWN, texts.squares(16))]


@pytest.fixture(scope="module")
def fp8(start_engine: Callable[[Settings], Engine]) -> Engine:
    return start_engine(Settings(cache_dtype="fp8"))


@pytest.fixture(scope="module")
def stock_run(start_engine: Callable[[Settings], Engine], prompts: list[list[int]]) -> Run:
    engine = start_engine(Settings(rkv=False, cache_dtype="fp8"))
    return engine.run([Ask(prompt, TOKENS) for prompt in prompts])


def test_budget_above_the_length_is_stock(fp8: Engine, prompts: list[list[int]], stock_run: Run) -> None:
    """Requests that never reach their budget get the tokens and logprobs of stock FP8 to the bit."""
    run = fp8.run([Ask(prompt, TOKENS, {"rkv_budget": ABOVE_ANY_LENGTH}) for prompt in prompts])

    assert_bit_identical(run.answers, stock_run.answers)
    assert not any(step.compacted for step in run.steps)


def test_moved_pages_are_stock(
    start_engine: Callable[[Settings], Engine], prompts: list[list[int]], stock_run: Run
) -> None:
    """Moving every request's whole KV into other pages every 16 tokens changes no bit of the output."""
    engine = start_engine(Settings(scheduler="identity_scheduler.IdentityScheduler", cache_dtype="fp8"))
    run = engine.run([Ask(prompt, TOKENS, {"rkv_budget": ABOVE_ANY_LENGTH}) for prompt in prompts])

    assert_bit_identical(run.answers, stock_run.answers)
    assert run.compactions(0) == (TOKENS - 2) // identity_scheduler.EVERY + 1


def test_compacted_requests_get_the_same_again(fp8: Engine, prompts: list[list[int]], stock_run: Run) -> None:
    """Requests of every policy within a budget of 32 get the same tokens and logprobs to the bit when they
    come in another order, and other ones than with their full cache. (In a batch of another size vLLM rounds
    differently, and a number at the border between two of FP8 falls to its other side, in stock vLLM too.)"""
    asks = [
        Ask(prompts[index % len(prompts)], TOKENS, {"rkv_budget": 32, "rkv_buffer": 16, "rkv_policy": policy})
        for index, policy in enumerate(POLICY_NAMES)
    ]
    run, again = fp8.run(asks), fp8.run(asks[::-1])

    assert_bit_identical(run.answers, again.answers[::-1])
    for answer, full in zip(run.answers, stock_run.answers, strict=False):
        assert answer.result["compactions"] >= 4
        assert answer.logprobs != full.logprobs


def test_pages_leave_alike(start_engine: Callable[[Settings], Engine], prompts: list[list[int]]) -> None:
    """By page, and in e5m2, requests of every policy drop pages, and get the same to the bit again."""
    engine = start_engine(Settings(granularity="page", cache_dtype="fp8_e5m2"))
    asks = [
        Ask(prompts[index % len(prompts)], TOKENS, {"rkv_budget": 64, "rkv_buffer": 8, "rkv_policy": policy})
        for index, policy in enumerate(POLICY_NAMES)
    ]
    run, again = engine.run(asks), engine.run(asks[::-1])

    assert_bit_identical(run.answers, again.answers[::-1])
    for answer in run.answers:
        assert answer.result["evicted_tokens"] >= PAGE_SIZE
