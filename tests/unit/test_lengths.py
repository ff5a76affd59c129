"""When a request is compacted, by counts alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.config import WINDOW, RequestBudget
from rkv_vllm.lengths import RequestLengths

prompts = st.integers(1, 300)
budgets = st.builds(RequestBudget, st.integers(WINDOW + 1, 200), st.integers(WINDOW, 100), st.just("rkv"))


@pytest.mark.parametrize(("prompt", "due"), [(1, 96), (95, 96), (96, 96), (97, 97), (500, 500)])
def test_first_compaction(prompt: int, due: int) -> None:
    """Proves that the first compaction comes at budget + buffer, and never before the prompt is computed."""
    lengths = RequestLengths(prompt, RequestBudget(64, 32, "rkv"))
    assert lengths.next_due == due
    assert not lengths.is_due(due - 1) and lengths.is_due(due)


@given(prompts, budgets)
def test_later_compactions(prompt: int, budget: RequestBudget) -> None:
    """Proves that a compaction leaves budget slots, and that the next one comes a buffer of tokens later."""
    lengths = RequestLengths(prompt, budget)
    first = lengths.next_due
    for round_ in range(4):
        logical = first + round_ * budget.buffer
        assert lengths.next_due == logical
        assert lengths.physical(logical) <= lengths.most_slots
        lengths.compact(logical)
        assert lengths.physical(logical) == budget.budget
        assert not lengths.is_due(logical)


@given(prompts, budgets, st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(0, 30))
def test_replay_stops_where_the_first_run_did(
    prompt: int, budget: RequestBudget, wishes: list[int], decoded: int
) -> None:
    """Proves that in chunks of any size a restarted request is compacted at the lengths of the first run."""

    def run(chunks: list[int], total: int) -> list[int]:
        points, logical, turn = [], 0, 0
        while logical < total:
            if lengths.is_due(logical):
                points.append(logical)
                lengths.compact(logical)
            chunk = lengths.end_of_chunk(logical, min(chunks[turn % len(chunks)], total - logical))
            assert chunk > 0
            logical, turn = logical + chunk, turn + 1
        return points

    lengths = RequestLengths(prompt, budget)
    total = prompt + decoded * budget.buffer
    first_run = run([1], total)
    lengths.restart()
    assert lengths.evicted == 0
    assert run(wishes, total) == first_run


@given(prompts, budgets)
def test_window_is_computed_here(prompt: int, budget: RequestBudget) -> None:
    """Proves that what may come from the prefix cache ends before the queries that a compaction looks at."""
    lengths = RequestLengths(prompt, budget)
    assert lengths.next_due - lengths.recorded_from == WINDOW
    lengths.compact(lengths.next_due)
    assert lengths.next_due - lengths.recorded_from == WINDOW
    assert lengths.recorded_from >= 0


@pytest.mark.parametrize(("prompt", "slots"), [(10, 96), (96, 96), (500, 500)])
def test_most_slots(prompt: int, slots: int) -> None:
    """Proves the bound that admission reckons with."""
    assert RequestLengths(prompt, RequestBudget(64, 32, "rkv")).most_slots == slots
