"""Which requests an engine is given."""

from __future__ import annotations

import pytest

from rkv_vllm.bench.load import (
    Load,
    ages,
    entry_tokens,
    pages_held,
    prompt_ids,
    requests_that_run,
    slots_held,
)
from rkv_vllm.bench.rows import Row
from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.settings.config import CompactionSettings

ROW = Row(name="row", input=128, output=1000, budget=256, buffer=64)
BUDGET = CompactionSettings(256, 64, "rkv")


@pytest.mark.parametrize("count", [1, 2, 7, 53, 418])
def test_ages_are_spread_evenly(count: int) -> None:
    """Proves that any number of requests has ages all over the range, each part as full as the others."""
    found = ages(ROW, count)
    assert found == sorted(found, reverse=True) and all(0 <= age < 1000 for age in found)
    for part in range(10):
        within = sum(100 * part <= age < 100 * (part + 1) for age in found)
        assert abs(within - count / 10) < 2


def test_both_engines_take_from_one_list() -> None:
    """Proves that an engine that holds fewer requests gets a part of the other's, request by request."""
    few, many = Load(ROW, "stock", 20), Load(ROW, "rkv", 50)
    assert {ask.age for ask in few.first[: few.aged]} < {ask.age for ask in many.first[: many.aged]}
    assert [(a.prompt_tokens, a.output_tokens) for a in few.first[:20]] == [
        (128 + a.age, 1000 - a.age) for a in few.first[:20]
    ]


def test_new_requests_wait_behind_and_replace() -> None:
    """Proves that a saturating load has its backlog, a fixed concurrency its own number, and that every
    request after them is new and different."""
    saturating = Load(ROW, "stock", 20)
    assert (saturating.aged, len(saturating.first)) == (20, 28)
    fixed = Load(Row(name="row", input=128, output=1000, concurrency=30), "stock", 20)
    assert (fixed.aged, len(fixed.first)) == (20, 30)
    later = [saturating.next() for _ in range(3)]
    for ask in (*saturating.first[20:], *fixed.first[20:], *later):
        assert (ask.age, ask.prompt_tokens, ask.output_tokens) == (0, 128, 1000)
    indexes = [ask.index for ask in (*saturating.first, *later)]
    assert indexes == list(range(31))
    assert [(a.prompt_tokens, a.output_tokens) for a in saturating.batch(2, 5)] == [(128, 5)] * 2


def test_a_load_goes_on_from_another() -> None:
    """Proves that who comes to those that stayed completes their ages, and that fewer need nobody."""
    row = Row(name="row", input=128, output=1000, concurrency=30)
    whole, rest = Load(row, "stock", 20), Load(row, "stock", 20, stayed=7)
    assert (rest.aged, len(rest.first)) == (13, 23)
    assert sorted([*ages(row, 7), *(ask.age for ask in rest.first[:13])]) == sorted(ages(row, 20))
    assert [ask.index for ask in rest.first] == list(range(7, 30))
    waits = Load(row, "stock", 20, stayed=25)  # five of those that stayed wait already
    assert (waits.aged, [ask.age for ask in waits.first]) == (0, [0] * 5)
    assert not Load(row, "stock", 20, stayed=30).first
    assert whole.first[20:] == rest.first[13:]


def test_nothing_fits() -> None:
    """Proves that a pool too small for one request is said, not divided by."""
    assert requests_that_run(ROW, None, pages=30, page_size=16, max_num_seqs=64) == 0
    with pytest.raises(ValueError, match="not one request fits"):
        Load(ROW, "stock", 0)


def test_requests_that_run_at_mean_length() -> None:
    """Proves that a pool is filled by the pages of all ages, up to max_num_seqs and the row's own number."""
    row = Row(name="row", input=16, output=32, budget=None)
    assert pages_held(row, None, 16) == (1 + 16 * 2 + 15 * 3) / 32
    assert requests_that_run(row, None, pages=78, page_size=16, max_num_seqs=64) == 32
    assert requests_that_run(row, None, pages=78, page_size=16, max_num_seqs=7) == 7
    fixed = row.model_copy(update={"concurrency": 5})
    assert requests_that_run(fixed, None, pages=78, page_size=16, max_num_seqs=64) == 5


@pytest.mark.parametrize("prompt", [1, 128, 319, 320, 321, 700])
def test_slots_held_are_those_of_the_scheduler_s_counts(prompt: int) -> None:
    """Proves for every length that a request is reckoned to hold what the scheduler would leave it."""
    lengths = RequestLengths(prompt, BUDGET)
    for logical in range(prompt, prompt + 1000):
        if lengths.is_due(logical):
            lengths.compact(logical)
        assert slots_held(prompt, logical, BUDGET) == lengths.physical(logical)
        assert slots_held(prompt, logical, None) == logical


@pytest.mark.parametrize("age", [0, 100, 191, 192, 193, 700, 999])
def test_entries(age: int) -> None:
    """Proves what each way of entering makes of an age."""
    capped = ROW.model_copy(update={"max_age": 150})
    assert entry_tokens(ROW, "staggered", age, BUDGET) == 128 + age
    assert entry_tokens(capped, "staggered", age, BUDGET) == 128 + age % 150
    assert entry_tokens(ROW, "compacted", age, BUDGET) == slots_held(128, 128 + age, BUDGET) < 320
    assert entry_tokens(ROW, "fresh", age, BUDGET) == 128 + age % 64


def test_prompts_are_reproducible_and_share_no_beginning() -> None:
    """Proves that a request has the same tokens in every engine, and no other request's first page."""
    asks = Load(ROW, "stock", 30).first
    prompts = [prompt_ids(0, ask, 32000) for ask in asks]
    assert prompts == [prompt_ids(0, ask, 32000) for ask in asks]
    assert all(len(prompt) == ask.prompt_tokens for prompt, ask in zip(prompts, asks, strict=True))
    assert len({tuple(prompt[:16]) for prompt in prompts}) == len(asks)
    assert all(1000 <= token < 32000 for prompt in prompts for token in prompt)
    assert prompt_ids(1, asks[0], 32000) != prompts[0]
    assert max(prompt_ids(0, asks[0], 40)) < 40
