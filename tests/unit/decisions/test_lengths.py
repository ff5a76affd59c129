"""When a request is compacted, by counts alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.lengths import NEVER, AutoLengths, PageLengths, RequestLengths, make_request_lengths
from rkv_vllm.settings.config import WINDOW, AutoBudget, CompactionSettings

prompts = st.integers(1, 300)
page_sizes = st.sampled_from([1, 4, 8, 16, 32, 128])
compaction_settings = st.builds(
    CompactionSettings, st.integers(WINDOW + 1, 200), st.integers(WINDOW, 100), st.just("rkv")
)


@pytest.mark.parametrize(("prompt", "due"), [(1, 96), (95, 96), (96, 96), (97, 97), (500, 500)])
def test_first_compaction(prompt: int, due: int) -> None:
    """Proves that the first compaction comes at budget + buffer, and never before the prompt is computed."""
    lengths = RequestLengths(prompt, CompactionSettings(64, 32, "rkv"))
    assert lengths.next_due == due
    assert not lengths.is_due(due - 1) and lengths.is_due(due)


@given(prompts, compaction_settings)
def test_later_compactions(prompt: int, settings: CompactionSettings) -> None:
    """Proves that a compaction leaves budget slots, and that the next one comes a buffer of tokens later."""
    lengths = RequestLengths(prompt, settings)
    first = lengths.next_due
    for round_ in range(4):
        logical = first + round_ * settings.buffer
        assert lengths.next_due == logical
        assert lengths.physical(logical) <= lengths.max_slots
        lengths.compact(logical)
        assert lengths.physical(logical) == settings.budget
        assert not lengths.is_due(logical)


@given(
    prompts, compaction_settings, st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(0, 30)
)
def test_replay_stops_where_the_first_run_did(
    prompt: int, settings: CompactionSettings, wishes: list[int], decoded: int
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

    lengths = RequestLengths(prompt, settings)
    total = prompt + decoded * settings.buffer
    first_run = run([1], total)
    lengths.restart()
    assert lengths.evicted == 0
    assert run(wishes, total) == first_run


@given(prompts, compaction_settings)
def test_window_is_computed_here(prompt: int, settings: CompactionSettings) -> None:
    """Proves that what may come from the prefix cache ends before the queries that a compaction looks at."""
    lengths = RequestLengths(prompt, settings)
    looked_at = settings.num_queries or 1  # at least the last token is computed
    assert lengths.next_due - lengths.capture_from == looked_at
    lengths.compact(lengths.next_due)
    assert lengths.next_due - lengths.capture_from == looked_at
    assert lengths.capture_from >= 0


@given(prompts, compaction_settings, page_sizes, st.integers(0, 400), st.integers(1, 400))
def test_a_free_chunk_is_left_alone(
    prompt: int, settings: CompactionSettings, page: int, logical: int, num_new_tokens: int
) -> None:
    """Proves that a chunk up to `unconstrained_until` is not cut, and ends before the window."""
    by_page = PageLengths(prompt, settings, page_size=page)
    leaving = PageLengths(prompt, settings, page_size=page)
    leaving.compact(leaving.next_due)
    for lengths in (RequestLengths(prompt, settings), by_page, leaving):
        logical = min(logical, lengths.unconstrained_until - 1)
        chunk = min(num_new_tokens, lengths.unconstrained_until - logical)
        assert lengths.end_of_chunk(logical, chunk) == chunk
        assert logical + chunk <= lengths.capture_from < lengths.next_due


@pytest.mark.parametrize(("prompt", "slots"), [(10, 96), (96, 96), (500, 500)])
def test_max_slots(prompt: int, slots: int) -> None:
    """Proves the bound that admission reckons with."""
    assert RequestLengths(prompt, CompactionSettings(64, 32, "rkv")).max_slots == slots


@pytest.mark.parametrize(
    ("budget", "buffer", "protect", "page", "kept", "due"),
    [
        (256, 128, 0, 16, 16, 384),
        (250, 128, 0, 16, 16, 378),
        (24, 8, 0, 16, 2, 40),
        (9, 8, 0, 16, 2, 40),
        (9, 8, 0, 4, 3, 20),
        (256, 128, 200, 16, 16, 384),  # 13 pages of protected tokens, and 2 that the window may touch
        (256, 128, 225, 16, 17, 384),
        (26, 8, 17, 16, 4, 72),
    ],
)
def test_pages_of_a_budget(budget: int, buffer: int, protect: int, page: int, kept: int, due: int) -> None:
    """Proves that a budget is rounded up to whole pages, to the protected and the window's at least, and that
    one can leave, a window of tokens after the last at the earliest."""
    lengths = PageLengths(1, CompactionSettings(budget, buffer, "rkv", protect), page_size=page)
    assert (lengths.kept_pages, lengths.due_slots) == (kept, due)


@given(prompts, compaction_settings, page_sizes)
def test_whole_pages_leave(prompt: int, settings: CompactionSettings, page: int) -> None:
    """Proves that a round leaves the budget's pages, none of the window's go, and what is held is bounded."""
    lengths = PageLengths(prompt, settings, page_size=page)
    logical = lengths.next_due
    for _ in range(4):
        assert lengths.next_due == logical and lengths.is_due(logical)
        before = lengths.physical(logical)
        assert lengths.allocated_slots(logical) == before
        lengths.compact(logical)
        after = lengths.physical(logical)
        assert lengths.leaving * page == before - after > 0
        assert (lengths.kept_pages - 1) * page < after <= lengths.kept_pages * page
        assert lengths.leaving <= (before - WINDOW) // page  # pages that hold no token of the window
        assert lengths.capture_from >= logical  # no query of this round's window is looked at again
        assert lengths.allocated_slots(logical) == before <= lengths.max_slots - page
        chunk = lengths.end_of_chunk(logical, 10_000)
        assert chunk >= 1 and lengths.allocated_slots(logical + chunk) <= lengths.max_slots
        assert not lengths.is_due(lengths.next_due)  # before the report
        lengths.confirm_freed()
        assert lengths.allocated_slots(logical) == after
        assert not lengths.is_due(logical)
        logical += lengths.end_of_chunk(logical, 10_000)


@given(prompts, compaction_settings, page_sizes)
def test_a_restart_forgets_leaving_pages(prompt: int, settings: CompactionSettings, page: int) -> None:
    """Proves that a preempted request waits for no report, and is due where it first was."""
    lengths = PageLengths(prompt, settings, page_size=page)
    first = lengths.next_due
    lengths.compact(first)
    lengths.restart()
    assert (lengths.evicted, lengths.leaving) == (0, 0)
    assert lengths.next_due == first and lengths.is_due(first)


def auto_lengths(prompt: int, settings: CompactionSettings, **auto: int) -> AutoLengths:
    lengths = make_request_lengths("token", prompt, replace(settings, auto=AutoBudget(**auto)), page_size=16)
    assert isinstance(lengths, AutoLengths)
    return lengths


@given(prompts, compaction_settings, st.integers(0, 10_000), st.integers(1, 10_000))
def test_auto_keeps_all_until_it_is_ordered(
    prompt: int, settings: CompactionSettings, logical: int, num_new_tokens: int
) -> None:
    """Proves that without an order nothing is due, no chunk is cut, and everything is held."""
    lengths = auto_lengths(prompt, settings)
    assert lengths.is_undecided and not lengths.is_due(logical)
    assert lengths.end_of_chunk(logical, num_new_tokens) == num_new_tokens
    assert logical + num_new_tokens < lengths.unconstrained_until
    assert lengths.max_slots == NEVER


@given(prompts, compaction_settings, st.integers(0, 1000))
def test_auto_is_a_fixed_budget_from_its_switch_on(
    prompt: int, settings: CompactionSettings, logical: int
) -> None:
    """Proves that an order is due once the queries that it looks at could be captured, and that the rounds
    behind it are those of the same budget without auto."""
    lengths = auto_lengths(prompt, settings)
    switch = lengths.earliest_switch(logical)
    assert lengths.needed_slots <= switch
    lengths.order(switch)
    assert not lengths.is_undecided and lengths.max_slots == lengths.next_due == switch
    assert lengths.capture_from >= logical
    lengths.compact(switch)
    lengths.confirm_compaction(switch)
    fixed = RequestLengths(prompt, settings, evicted=switch - settings.budget)
    for _ in range(3):
        assert lengths.physical(lengths.next_due) == settings.threshold
        assert (lengths.next_due, lengths.capture_from) == (fixed.next_due, fixed.capture_from)
        assert lengths.switched_at == switch and not lengths.is_undecided
        lengths.compact(lengths.next_due)
        fixed.compact(fixed.next_due)


@given(prompts, compaction_settings, st.integers(0, 1000), st.booleans())
def test_auto_replays_the_switch_that_it_carried_out(
    prompt: int, settings: CompactionSettings, logical: int, carried_out: bool
) -> None:
    """Proves that a preempted request switches where it did, and is free again where it had not yet."""
    lengths = auto_lengths(prompt, settings)
    switch = lengths.earliest_switch(logical)
    lengths.order(switch)
    if carried_out:
        for _ in range(2):
            lengths.compact(lengths.next_due)
            lengths.confirm_compaction(lengths.evicted + settings.budget)
    else:
        lengths.compact(switch)  # and the request was preempted in the same step
    lengths.restart()
    assert lengths.evicted == 0
    assert lengths.next_due == (switch if carried_out else NEVER)
    assert lengths.is_undecided is not carried_out


@given(prompts, compaction_settings, st.integers(1, 2000))
def test_auto_switches_where_it_is_told(prompt: int, settings: CompactionSettings, length: int) -> None:
    """Proves that `switch_at` and `max_budget` are due by counts alone, and only the former is final."""
    earliest = max(prompt, settings.threshold)
    told, bounded = (
        auto_lengths(prompt, settings, switch_at=length),
        auto_lengths(prompt, settings, max_budget=length),
    )
    assert told.next_due == bounded.next_due == max(earliest, length)
    assert not told.is_undecided and bounded.is_undecided
    assert told.needed_slots == max(earliest, length) and bounded.needed_slots == earliest
    bounded.order(earliest)
    assert bounded.next_due == earliest
    bounded.restart()
    bounded.compact(bounded.next_due)
    bounded.confirm_compaction(bounded.evicted + settings.budget)
    assert bounded.switched_at == max(earliest, length) and not bounded.is_undecided


@given(prompts, compaction_settings, st.integers(0, 500))
def test_auto_can_switch_on_arrival(prompt: int, settings: CompactionSettings, generated: int) -> None:
    """Proves that what may come from the prefix cache ends before the queries of a switch that is ordered as
    the request arrives, which no token that it has generated has seen."""
    lengths = auto_lengths(prompt, settings)
    num_tokens = prompt + generated
    switch = lengths.switch_on_arrival(num_tokens)
    assert switch >= max(prompt, num_tokens - 1)
    assert lengths.cacheable(num_tokens) < switch - settings.num_queries
    lengths.order(switch)
    assert lengths.cacheable(num_tokens) < lengths.capture_from
    lengths.compact(switch)
    lengths.confirm_compaction(switch)
    lengths.restart()
    assert lengths.cacheable(num_tokens + 100) < lengths.capture_from == switch - max(settings.num_queries, 1)


@given(prompts, compaction_settings, st.integers(0, 20))
def test_what_is_reserved_for_auto(prompt: int, settings: CompactionSettings, notice: int) -> None:
    """Proves that room is kept for the prompt until it is computed, then for budget, buffer and the notice of
    a switch, and for the way to a switch that was ordered."""
    lengths = auto_lengths(prompt, settings)
    assert lengths.reserved_slots(prompt, notice) == max(prompt, settings.threshold) + notice
    assert lengths.reserved_slots(0, notice) == settings.threshold + notice
    switch = lengths.earliest_switch(prompt + 100)
    lengths.order(switch)
    assert lengths.reserved_slots(0, notice) == switch
    lengths.compact(switch)
    assert lengths.reserved_slots(0, notice) == settings.threshold
