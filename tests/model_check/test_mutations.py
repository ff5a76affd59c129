"""The model check itself: with one rule of the protocol broken, it must raise."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pytest
import symbolic_worker
from model_check_engine import Engine
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from workload import by_page, random_arrivals, random_setup, with_auto, with_drafts, with_groups

from rkv_vllm.decisions.auto_lengths import AutoLengths
from rkv_vllm.decisions.lengths import PageLengths, RequestLengths
from rkv_vllm.decisions.query_rows import QueryRows
from rkv_vllm.execution.cpu.group_table import CpuGroupTable
from rkv_vllm.observability.metric_table import SwitchCause
from rkv_vllm.scheduling import page_groups
from rkv_vllm.scheduling import scheduler as scheduler_module
from rkv_vllm.scheduling.auto_budgets import AutoBudgets
from rkv_vllm.scheduling.block_manager import CompactingManager, PageMove
from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.scheduling.round_planner import RoundPlanner
from rkv_vllm.scheduling.scheduler import CompactingSchedulerMixin
from rkv_vllm.scheduling.tracked_request import TrackedRequest
from rkv_vllm.settings.values import Switch

Break = Callable[[pytest.MonkeyPatch], None]
#: What the runs are like: single tokens leave, or whole pages, or tokens where memory is short, or tokens of
#: requests that speculate, or those of some groups of layers.
Workload = Literal["by token", "by page", "auto", "drafts", "groups"]
#: Seeds of the runs.
RUNS: dict[Workload, range] = {
    "by token": range(60),
    # More, for few runs have pages that leave while the request goes on fast enough.
    "by page": range(120),
    # In some of these a prompt fills the pool, or finds most of itself in the cache.
    "auto": range(110, 190),
    "drafts": range(60),
    "groups": range(60),
}


@dataclass(frozen=True)
class Mutation:
    """One rule of the protocol, broken by `breaks`, and the error by which the check notices."""

    breaks: Break
    workload: Workload
    raises: type[Exception]
    message: str | None

    def __str__(self) -> str:
        return self.breaks.__name__


MUTATIONS: list[Mutation] = []


def mutation(
    *,
    workload: Workload = "by token",
    raises: type[Exception] = AssertionError,
    message: str | None = None,
) -> Callable[[Break], Break]:
    """Registers a function that breaks one rule.

    Args:
        workload: in which runs.
        raises: what stops the run, where it is not an assertion of the check itself.
        message: a regular expression that the error's text must contain.
    """

    def register(breaks: Break) -> Break:
        MUTATIONS.append(Mutation(breaks, workload, raises, message))
        return breaks

    return register


@mutation()
def write_shared_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "is_block_writable", lambda pool, block: not block.is_null)


@mutation()
def write_cached_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "is_block_writable", lambda pool, block: block.ref_cnt == 1)


@mutation()
def keep_the_past_of_a_preempted_request(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TrackedRequest, "restart", lambda tracked: None)


@mutation()
def keep_evicted_of_freed_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "pop_blocks_for_free", FullAttentionManager.pop_blocks_for_free)


@mutation()
def cache_compacted_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "cache_blocks", FullAttentionManager.cache_blocks)


@mutation(message="holds .* pages, not")
def allocate_by_logical_length(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "allocate_new_blocks", FullAttentionManager.allocate_new_blocks)


@mutation()
def release_pages_between_compactions(patch: pytest.MonkeyPatch) -> None:
    compact, release = CompactingManager.compact, CompactingManager.release

    def compact_and_release(manager: CompactingManager, *args: Any, **kwargs: Any) -> Any:
        move = compact(manager, *args, **kwargs)
        release(manager, [move])
        return move

    patch.setattr(CompactingManager, "compact", compact_and_release)
    patch.setattr(CompactingManager, "release", lambda manager, moves: None)


@mutation()
def forget_to_release_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "release", lambda manager, moves: None)


@mutation()
def replay_in_any_chunks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestLengths, "end_of_chunk", lambda lengths, logical, num_new_tokens: num_new_tokens)


@mutation()
def adopt_a_prefix_into_the_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        CompactingSchedulerMixin, "_get_local_prefix_cache_hit", Scheduler._get_local_prefix_cache_hit
    )


@mutation()
def capture_one_query_too_few(patch: pytest.MonkeyPatch) -> None:
    late = property(lambda lengths: lengths.next_due - max(lengths.settings.num_queries - 1, 1))
    patch.setattr(RequestLengths, "capture_from", late)


@mutation()
def compact_a_buffer_too_late(patch: pytest.MonkeyPatch) -> None:
    late = property(
        lambda lengths: max(lengths.num_prompt_tokens, lengths.evicted + lengths.settings.threshold + 1)
    )
    patch.setattr(RequestLengths, "next_due", late)


@mutation()
def look_at_chunks_too_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestLengths, "unconstrained_until", property(lambda lengths: lengths.next_due))


@mutation()
def believe_a_resumed_request_far_from_its_compaction(patch: pytest.MonkeyPatch) -> None:
    def restart(tracked: TrackedRequest) -> None:
        tracked.lengths.restart()
        tracked.rounds = 0

    patch.setattr(TrackedRequest, "restart", restart)


@mutation()
def overlook_a_request_that_is_due(patch: pytest.MonkeyPatch) -> None:
    end_of_chunk = RoundPlanner.end_of_chunk

    def overlook(planner: RoundPlanner, *args: Any) -> int:
        num_new_tokens = end_of_chunk(planner, *args)
        del planner._may_be_due[1:]
        return num_new_tokens

    patch.setattr(RoundPlanner, "end_of_chunk", overlook)


@mutation()
def give_up_where_no_page_is_free(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        RoundPlanner,
        "_preempt_until_compactable",
        lambda planner, request, tracked: planner._groups.can_compact(
            request.request_id, tracked.settings.budget
        ),
    )


@mutation(raises=KeyError, message="request-")
def keep_query_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QueryRows, "release", lambda rows, request_id: None)


@mutation()
def share_query_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QueryRows, "row_of", lambda rows, request_id: 0)


@mutation()
def plan_with_a_stale_length(patch: pytest.MonkeyPatch) -> None:
    begin_round = RoundPlanner._begin_round

    def begin_with_a_stale_length(planner: Any, *args: Any) -> Any:
        compaction = begin_round(planner, *args)
        return replace(compaction, length=compaction.length - 1)

    patch.setattr(RoundPlanner, "_begin_round", begin_with_a_stale_length)


@mutation()
def capture_the_wrong_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(
        symbolic_worker.SymbolicRunner._set_captures.__globals__,
        "captured_positions",
        lambda first, count: range(first, min(first + count, first + 8)),
    )


@mutation()
def write_slots_by_logical_position(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(symbolic_worker.SymbolicRunner, "_map_slots", lambda *args: None)


@mutation()
def read_as_many_slots_as_the_text_has_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(symbolic_worker.SymbolicRunner, "_physical", lambda runner, common: common)


@mutation()
def leave_the_batch_row_as_it_was(patch: pytest.MonkeyPatch) -> None:
    def replace_pages(table: Any, request_id: str, pages: Any) -> None:
        table._requests[request_id].block_ids[table._group_id][:] = pages

    patch.setattr(CpuGroupTable, "replace_pages", replace_pages)


@mutation()
def compact_after_the_pages_were_given_away(patch: pytest.MonkeyPatch) -> None:
    execute = symbolic_worker.SymbolicRunner.execute

    def execute_late(runner: Any, scheduler_output: Any) -> Any:
        [(compactor, _)] = runner._compactors.compactors
        move, held = compactor._move, []
        compactor._move = held.append
        answer = execute(runner, scheduler_output)
        compactor._move = move
        for compaction in held:
            move(compaction)
        return answer

    patch.setattr(symbolic_worker.SymbolicRunner, "execute", execute_late)


@mutation(workload="by page")
def guess_which_pages_left(patch: pytest.MonkeyPatch) -> None:
    remove = CompactingManager.remove_pages

    def remove_oldest(manager: CompactingManager, request_id: str, page_ids: tuple[int, ...]) -> None:
        pages = manager.req_to_blocks[request_id][: len(page_ids)]
        remove(manager, request_id, [page.block_id for page in pages])

    patch.setattr(CompactingManager, "remove_pages", remove_oldest)


@mutation(workload="by page")
def forget_reports(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RoundPlanner, "apply_page_report", lambda planner, report: 0)


@mutation(workload="by page")
def keep_the_pages_that_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "remove_pages", lambda manager, request_id, page_ids: None)


@mutation(workload="by page")
def go_on_caching(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CompactingManager, "cache_blocks", FullAttentionManager.cache_blocks)


@mutation(workload="by page")
def keep_leaving_pages_of_a_preempted_request(patch: pytest.MonkeyPatch) -> None:
    def restart(lengths: PageLengths) -> None:
        lengths.evicted = 0

    patch.setattr(PageLengths, "restart", restart)


@mutation(workload="by page")
def take_pages_while_others_are_leaving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageLengths, "end_of_chunk", RequestLengths.end_of_chunk)


@mutation(workload="by page")
def forget_that_others_are_leaving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageLengths, "unconstrained_until", RequestLengths.unconstrained_until)


@mutation(workload="by page")
def plan_again_before_the_report(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageLengths, "is_due", RequestLengths.is_due)


@mutation(workload="by page")
def drop_a_page_of_the_window(patch: pytest.MonkeyPatch) -> None:
    leaving = symbolic_worker.leaving_pages

    def newest(symbols: Any, queries: Any, keep: int, page_size: int, protected: int) -> list[int]:
        left = leaving(symbols, queries, keep, page_size, protected)
        return [*left[:-1], (len(symbols) - 1) // page_size]

    patch.setattr(symbolic_worker, "leaving_pages", newest)


@mutation(workload="by page")
def leave_evicted_pages_in_the_batch_row(patch: pytest.MonkeyPatch) -> None:
    def replace_pages(table: Any, request_id: str, pages: Any) -> None:
        table._requests[request_id].block_ids[table._group_id][:] = pages

    patch.setattr(CpuGroupTable, "replace_pages", replace_pages)


@mutation()
def protect_nothing(patch: pytest.MonkeyPatch) -> None:
    """The scheduler's messages leave out what is protected."""
    begin_round = RoundPlanner._begin_round

    def begin_unprotected(planner: Any, *args: Any) -> Any:
        return replace(begin_round(planner, *args), protect=0)

    patch.setattr(RoundPlanner, "_begin_round", begin_unprotected)


@mutation(workload="by page")
def protect_the_pages_that_are_filled(patch: pytest.MonkeyPatch) -> None:
    """A page with some protected tokens in it counts as none."""
    leaving = symbolic_worker.leaving_pages

    def leave(symbols: Any, queries: Any, keep: int, page_size: int, protected: int) -> list[int]:
        return leaving(symbols, queries, keep, page_size, max(protected - 1, 0))

    patch.setattr(symbolic_worker, "leaving_pages", leave)


@mutation(workload="by page", raises=ValueError, message="larger than population")
def keep_no_room_beside_protected_pages(patch: pytest.MonkeyPatch) -> None:
    budget = property(lambda lengths: max(lengths._pages(lengths.settings.budget), 1 + lengths._pages(7)))
    patch.setattr(PageLengths, "kept_pages", budget)


@mutation(workload="auto")
def order_a_switch_one_token_late(patch: pytest.MonkeyPatch) -> None:
    """With one query too few captured."""
    earliest = AutoLengths.earliest_switch
    patch.setattr(AutoLengths, "earliest_switch", lambda lengths, logical: earliest(lengths, logical) - 1)


@mutation(workload="auto")
def go_on_past_an_order(patch: pytest.MonkeyPatch) -> None:
    """What is known of where chunks have to end is that before the order."""

    def order_switch(tracked: TrackedRequest, switch: Switch, cause: SwitchCause) -> None:
        assert isinstance(tracked.lengths, AutoLengths)
        tracked.lengths.order(switch)

    patch.setattr(TrackedRequest, "order_switch", order_switch)


@mutation(workload="auto", message="does not come to an end")
def order_nobody_on_arrival(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AutoBudgets, "order_on_arrival", lambda autos, request: None)


@mutation(workload="auto")
def adopt_any_prefix_before_a_switch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AutoLengths, "cacheable", lambda lengths, num_tokens: num_tokens - 1)


@mutation(workload="auto")
def forget_where_a_preempted_request_has_switched(patch: pytest.MonkeyPatch) -> None:
    def restart(lengths: AutoLengths) -> None:
        lengths.evicted, lengths._done, lengths._kept = 0, 0, None
        lengths._order = None
        lengths._switches.clear()

    patch.setattr(AutoLengths, "restart", restart)


@mutation(workload="auto")
def overlook_an_order_that_is_due_at_once(patch: pytest.MonkeyPatch) -> None:
    order_switches = RoundPlanner.order_switches

    def order(planner: RoundPlanner, orders: Any) -> None:
        before = list(planner._may_be_due)
        order_switches(planner, orders)
        planner._may_be_due[:] = before

    patch.setattr(RoundPlanner, "order_switches", order)


@mutation(workload="drafts")
def compact_before_drafts_are_known(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RoundPlanner, "_may_be_rolled_back", lambda planner, request: False)


@mutation(workload="drafts")
def verify_drafts_past_a_round(patch: pytest.MonkeyPatch) -> None:
    """Only chunks of prompts and replays end where a round is due."""
    end_of_chunk = RoundPlanner.end_of_chunk

    def end(planner: RoundPlanner, request: Any, tracked: Any, computed: int, num_new_tokens: int) -> int:
        fewer = end_of_chunk(planner, request, tracked, computed, num_new_tokens)
        return num_new_tokens if computed + 1 >= request.num_tokens else fewer

    patch.setattr(RoundPlanner, "end_of_chunk", end)


@mutation(workload="groups", message="is not what its hash says")
def cache_windows_of_compacted_requests(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_groups, "keep_out", lambda coordinator, compacted: None)


@mutation(workload="groups")
def cut_a_hit_short_in_every_group(patch: pytest.MonkeyPatch) -> None:
    """A window's pages at the end of a long hit are not those at the end of a shorter one."""

    def truncated(manager: Any, request: Any, most: int) -> Any:
        blocks, _, _ = manager.get_computed_blocks(request)
        size = manager.block_pool.hash_block_size
        most = most // size * size
        return manager.create_kv_cache_blocks(tuple(group[: most // size] for group in blocks.blocks)), most

    patch.setattr(scheduler_module, "shorter_hit", truncated)


@mutation(workload="groups", message="holds .* pages, not")
def shorten_the_first_group_alone(patch: pytest.MonkeyPatch) -> None:
    def compact(groups: PageGroups, request_id: str, *args: Any, **kwargs: Any) -> list[PageMove]:
        first, *others = groups._compacted
        ids = [tuple(page.block_id for page in other.req_to_blocks[request_id]) for other in others]
        return [
            first.compact(request_id, *args, **kwargs),
            *(PageMove(source_pages=pages, target_pages=pages, freed=()) for pages in ids),
        ]

    patch.setattr(PageGroups, "compact", compact)


@mutation(workload="groups")
def give_a_groups_pages_to_the_next(patch: pytest.MonkeyPatch) -> None:
    """Within a step, before the other group has read them."""
    compact = CompactingManager.compact

    def compact_and_free(manager: CompactingManager, *args: Any, **kwargs: Any) -> PageMove:
        move = compact(manager, *args, **kwargs)
        manager.block_pool.free_blocks(reversed(move.freed))
        return replace(move, freed=())

    patch.setattr(CompactingManager, "compact", compact_and_free)


@mutation(workload="groups", message="a window group reads")
def show_windows_as_little_as_the_rest(patch: pytest.MonkeyPatch) -> None:
    lengths = symbolic_worker.SymbolicRunner._attended_lengths

    def physical(runner: Any, group: int) -> Any:
        return lengths(runner, runner._groups[0].group_id)

    patch.setattr(symbolic_worker.SymbolicRunner, "_attended_lengths", physical)


@mutation(workload="groups")
def write_windows_where_the_rest_goes(patch: pytest.MonkeyPatch) -> None:
    map_slots = symbolic_worker.SymbolicRunner._map_slots

    def map_all(runner: Any, *args: Any) -> None:
        groups = runner._groups
        every = range(len(runner.attn_groups))
        runner._groups = [replace(groups[0], group_id=group) for group in every]
        map_slots(runner, *args)
        runner._groups = groups

    patch.setattr(symbolic_worker.SymbolicRunner, "_map_slots", map_all)


@mutation(workload="groups")
def replace_the_pages_of_every_group(patch: pytest.MonkeyPatch) -> None:
    replace_pages = CpuGroupTable.replace_pages

    def replace_all(table: CpuGroupTable, request_id: str, pages: Any) -> None:
        for group in range(len(table._requests[request_id].block_ids)):
            replace_pages(CpuGroupTable(table._requests, table._input_batch, group), request_id, pages)

    patch.setattr(CpuGroupTable, "replace_pages", replace_all)


def run_random_engines(workload: Workload) -> None:
    for seed in RUNS[workload]:
        chance = random.Random(seed)
        arrivals = random_arrivals(chance, count=8)
        if workload == "auto":
            arrivals = with_auto(chance, arrivals)
        setup = replace(random_setup(chance, arrivals), depth=1 + seed % 3)
        if workload == "by page":
            setup = by_page(setup, arrivals)
        if workload == "drafts":
            setup = with_drafts(chance, setup)
        if workload == "groups":
            setup = with_groups(chance, setup, arrivals)
        Engine(setup, arrivals).run(most_steps=2_000)


@pytest.mark.parametrize("workload", get_args(Workload))
def test_unbroken_rules_pass(workload: Workload) -> None:
    """Proves that the same runs pass with nothing broken: what fails below fails for its mutation alone."""
    run_random_engines(workload)


@pytest.mark.parametrize("broken", MUTATIONS, ids=str)
def test_a_broken_rule_is_noticed(broken: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the check fails when the protocol is broken in this way, within a few random runs."""
    broken.breaks(monkeypatch)
    with pytest.raises(broken.raises, match=broken.message):
        run_random_engines(broken.workload)
