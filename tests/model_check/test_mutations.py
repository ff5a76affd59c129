"""The model check itself: with one rule of the protocol broken, it must raise."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import symbolic_worker
from model_check_engine import Engine
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from workload import by_page, random_arrivals, random_setup

from rkv_vllm.decisions.lengths import PageLengths, RequestLengths
from rkv_vllm.decisions.query_rows import QueryRows
from rkv_vllm.scheduling.block_manager import CompactingManager
from rkv_vllm.scheduling.round_planner import RoundPlanner
from rkv_vllm.scheduling.scheduler import CompactingSchedulerMixin
from rkv_vllm.scheduling.tracked_request import TrackedRequest
from rkv_vllm.settings.config import WINDOW

Break = Callable[[pytest.MonkeyPatch], None]
MOST_RUNS = 30


def _write_shared_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "is_block_writable", lambda pool, page: not page.is_null)


def _write_cached_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "is_block_writable", lambda pool, page: page.ref_cnt == 1)


def _keep_the_past_of_a_preempted_request(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TrackedRequest, "restart", lambda tracked: None)


def _keep_evicted_of_freed_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "pop_blocks_for_free", FullAttentionManager.pop_blocks_for_free)


def _cache_compacted_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "cache_blocks", FullAttentionManager.cache_blocks)


def _allocate_by_logical_length(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "allocate_new_blocks", FullAttentionManager.allocate_new_blocks)


def _release_pages_between_compactions(patch: pytest.MonkeyPatch) -> None:
    compact, release = CompactingManager.compact, CompactingManager.release

    def compact_and_release(manager: CompactingManager, *args: Any) -> Any:
        move = compact(manager, *args)
        release(manager, [move])
        return move

    patch.setattr(CompactingManager, "compact", compact_and_release)
    patch.setattr(CompactingManager, "release", lambda manager, moves: None)


def _forget_to_release_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "release", lambda manager, moves: None)


def _replay_in_any_chunks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestLengths, "end_of_chunk", lambda lengths, logical, num_new_tokens: num_new_tokens)


def _adopt_a_prefix_into_the_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        CompactingSchedulerMixin, "_get_local_prefix_cache_hit", Scheduler._get_local_prefix_cache_hit
    )


def _record_one_query_too_few(patch: pytest.MonkeyPatch) -> None:
    late = property(lambda lengths: max(lengths.next_due - WINDOW + 1, 0))
    patch.setattr(RequestLengths, "recorded_from", late)


def _compact_a_buffer_too_late(patch: pytest.MonkeyPatch) -> None:
    late = property(
        lambda lengths: max(lengths.num_prompt_tokens, lengths.evicted + lengths.settings.threshold + 1)
    )
    patch.setattr(RequestLengths, "next_due", late)


def _look_at_chunks_too_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestLengths, "unconstrained_until", property(lambda lengths: lengths.next_due))


def _believe_a_resumed_request_far_from_its_compaction(patch: pytest.MonkeyPatch) -> None:
    def restart(tracked: TrackedRequest) -> None:
        tracked.lengths.restart()
        tracked.rounds = 0

    patch.setattr(TrackedRequest, "restart", restart)


def _overlook_a_request_that_is_due(patch: pytest.MonkeyPatch) -> None:
    end_of_chunk = RoundPlanner.end_of_chunk

    def overlook(planner: RoundPlanner, *args: Any) -> int:
        num_new_tokens = end_of_chunk(planner, *args)
        del planner._may_be_due[1:]
        return num_new_tokens

    patch.setattr(RoundPlanner, "end_of_chunk", overlook)


def _give_up_where_no_page_is_free(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        RoundPlanner,
        "_preempt_until_compactable",
        lambda planner, request, tracked: planner._manager.can_compact(
            request.request_id, tracked.settings.budget
        ),
    )


def _keep_query_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QueryRows, "release", lambda rows, request_id: None)


def _share_query_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QueryRows, "row_of", lambda rows, request_id: 0)


def _plan_with_a_stale_length(patch: pytest.MonkeyPatch) -> None:
    begin_round = RoundPlanner._begin_round

    def begin_with_a_stale_length(planner: Any, request: Any, tracked: Any) -> Any:
        compaction = begin_round(planner, request, tracked)
        return replace(compaction, length=compaction.length - 1)

    patch.setattr(RoundPlanner, "_begin_round", begin_with_a_stale_length)


def _record_the_wrong_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(
        symbolic_worker.SymbolicRunner._record_queries.__globals__,
        "window_positions",
        lambda first, count: range(first, min(first + count, first + 8)),
    )


def _write_slots_by_logical_position(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(symbolic_worker.SymbolicRunner, "_make_physical", lambda *args: None)


def _leave_the_batch_row_as_it_was(patch: pytest.MonkeyPatch) -> None:
    def replace_pages(runner: Any, request_id: str, pages: Any) -> None:
        runner.requests[request_id].block_ids[0][:] = pages

    patch.setattr(symbolic_worker.SymbolicRunner, "replace_pages", replace_pages)


def _compact_after_the_pages_were_given_away(patch: pytest.MonkeyPatch) -> None:
    execute = symbolic_worker.SymbolicRunner.execute

    def execute_late(runner: Any, scheduler_output: Any) -> Any:
        move, held = runner._compactor._move, []
        runner._compactor._move = held.append
        answer = execute(runner, scheduler_output)
        runner._compactor._move = move
        for compaction in held:
            move(compaction)
        return answer

    patch.setattr(symbolic_worker.SymbolicRunner, "execute", execute_late)


def by_page_guess_which_pages_left(patch: pytest.MonkeyPatch) -> None:
    remove = CompactingManager.remove_pages

    def remove_oldest(manager: CompactingManager, request_id: str, page_ids: tuple[int, ...]) -> None:
        pages = manager.req_to_blocks[request_id][: len(page_ids)]
        remove(manager, request_id, [page.block_id for page in pages])

    patch.setattr(CompactingManager, "remove_pages", remove_oldest)


def by_page_forget_reports(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RoundPlanner, "apply_page_report", lambda planner, report: 0)


def by_page_keep_the_pages_that_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "remove_pages", lambda manager, request_id, page_ids: None)


def by_page_go_on_caching(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "cache_blocks", FullAttentionManager.cache_blocks)


def by_page_keep_leaving_pages_of_a_preempted_request(patch: pytest.MonkeyPatch) -> None:
    def restart(lengths: PageLengths) -> None:
        lengths.evicted = 0

    patch.setattr(PageLengths, "restart", restart)


def by_page_take_pages_while_others_are_leaving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageLengths, "end_of_chunk", RequestLengths.end_of_chunk)


def by_page_forget_that_others_are_leaving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageLengths, "unconstrained_until", RequestLengths.unconstrained_until)


def by_page_plan_again_before_the_report(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageLengths, "is_due", RequestLengths.is_due)


def by_page_drop_a_page_of_the_window(patch: pytest.MonkeyPatch) -> None:
    leaving = symbolic_worker.leaving_pages

    def newest(symbols: Any, queries: Any, keep: int, page_size: int) -> list[int]:
        left = leaving(symbols, queries, keep, page_size)
        return [*left[:-1], (len(symbols) - 1) // page_size]

    patch.setattr(symbolic_worker, "leaving_pages", newest)


def by_page_leave_the_batch_row_as_it_was(patch: pytest.MonkeyPatch) -> None:
    def replace_pages(runner: Any, request_id: str, pages: Any) -> None:
        runner.requests[request_id].block_ids[0][:] = pages

    patch.setattr(symbolic_worker.SymbolicRunner, "replace_pages", replace_pages)


BREAKS: tuple[Break, ...] = tuple(
    breaks
    for name, breaks in list(globals().items())
    if name.startswith("_") and callable(breaks) and getattr(breaks, "__module__", None) == __name__
)
BREAKS_BY_PAGE: tuple[Break, ...] = tuple(
    breaks for name, breaks in list(globals().items()) if name.startswith("by_page_")
)


def _runs(pages: bool = False) -> int:
    for seed in range(MOST_RUNS):
        chance = random.Random(seed)
        arrivals = random_arrivals(chance, count=8)
        setup = replace(random_setup(chance, arrivals), depth=1 + seed % 3)
        Engine(by_page(setup, arrivals) if pages else setup, arrivals).run(most_steps=2_000)
    return MOST_RUNS


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda breaks: breaks.__name__.strip("_"))
def test_a_broken_rule_is_noticed(breaks: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the check fails when the protocol is broken in this way, within a few random runs."""
    breaks(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError)):
        _runs()


@pytest.mark.parametrize("breaks", BREAKS_BY_PAGE, ids=lambda breaks: breaks.__name__)
def test_a_broken_rule_by_page_is_noticed(breaks: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the same of the rules by which whole pages leave."""
    breaks(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError)):
        _runs(pages=True)
