"""When a request is compacted, by counts alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.lengths import PageLengths, RequestLengths
from rkv_vllm.settings.config import WINDOW, CompactionSettings

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
