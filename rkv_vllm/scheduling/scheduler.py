"""vLLM's schedulers with compaction: plans rounds from counts, before vLLM schedules the step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from rkv_vllm.decisions.lengths import PageLengths, RequestLengths, make_request_lengths
from rkv_vllm.decisions.messages import (
    REFUSAL_KEY,
    RESULT_KEY,
    Compaction,
    CompactionPlan,
    CompactionResult,
    PageCompaction,
    PageReport,
    TokenCompaction,
    attach_plan,
    durations_of,
    put_tally,
    reports_of,
)
from rkv_vllm.decisions.pool_forecast import Course, Endings, Outlook
from rkv_vllm.decisions.query_rows import QueryRows, num_query_rows
from rkv_vllm.decisions.sizing import peak_slots
from rkv_vllm.host.compatibility import refuse_unsupported
from rkv_vllm.observability.tally import Counters
from rkv_vllm.scheduling.block_manager import CompactingManager, PageMove, register_compacting_spec
from rkv_vllm.settings.config import CompactionSettings, RequestedSettings, RkvConfig

# The mixin is put before either of vLLM's schedulers; the type checker is told of what they share.
if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object

logger = init_logger(__name__)

#: So many steps pass until what running requests will hold is looked at again, unless one comes or goes.
_STEPS_PER_OUTLOOK = 8


@dataclass(slots=True)
class TrackedRequest:
    """A request that is compacted, and what its result will say.

    `rounds` counts compactions since it last started from nothing; `eviction_id` is that of its last
    `PageCompaction`; `unconstrained_until` is that of `lengths`, or lower.
    """

    lengths: RequestLengths
    unconstrained_until: int = 0
    rounds: int = 0
    compactions: int = 0
    evicted_tokens: int = 0
    peak_pages: int = 0
    eviction_id: int = -1

    @property
    def settings(self) -> CompactionSettings:
        return self.lengths.settings

    def count(self, compaction: Compaction) -> None:
        self.rounds += 1
        # Kept at their highest, so that a request which ends while preempted still says what happened to it.
        self.compactions = max(self.compactions, self.rounds)
        self.evicted_tokens = max(self.evicted_tokens, compaction.evicted)

    def restart(self) -> None:
        self.lengths.restart()
        self.unconstrained_until = 0
        self.rounds = 0


class CompactingSchedulerMixin(_Scheduler):
    """Put before one of vLLM's schedulers.

    In each step, before vLLM decides anything: every running request that is due is shortened to its budget,
    so that the freed pages serve this step's allocations. The workers execute the plan first thing in the
    step. Whether a request is due follows from its own counts, never from its neighbours or from sampled
    tokens.

    Waiting requests are admitted when there is room for what those that run will come to hold.

    By page, only the device knows which pages leave. They are counted as the request's until the workers'
    report comes back with the output of the step, one or more steps later.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The registry is asked for the manager class while the base class is being built.
        register_compacting_spec()
        super().__init__(*args, **kwargs)
        vllm_config: VllmConfig = self.vllm_config
        refuse_unsupported(vllm_config)
        self._rkv_config = RkvConfig.from_additional_config(vllm_config.additional_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or not isinstance(managers[0], CompactingManager):
            raise ValueError(
                "rkv-vllm's scheduler needs one KV cache group under its own manager; found "
                f"{[type(manager).__name__ for manager in managers]}: is rkv-vllm's worker selected too?"
            )
        self._manager = managers[0]
        self._query_rows = QueryRows(num_query_rows(vllm_config.scheduler_config.max_num_seqs))
        self._tracked: dict[str, TrackedRequest] = {}
        self._may_be_due: list[Request] = []  # every request that is due, and some that are not
        self._with_stop_strings: set[str] = set()
        self._refusals: list[tuple[int, EngineCoreOutput]] = []  # with the client that asked
        self._sequences = itertools.count()
        self._watermark = self.kv_cache_manager.watermark_blocks  # what the server's operator asks for
        self._endings = Endings()
        self._outlook = Outlook([], None, 0.0, self._manager.block_size)  # of running requests with a budget
        self._held_pages = 0  # by them, as far as known: too few rather than too many
        self._admitted: Course | None = None  # in this step, if vLLM asks for another one
        self._steps_to_outlook = 0
        pool = self.kv_cache_manager.block_pool
        self._counters = Counters(self._manager.block_size, pool.num_gpu_blocks - 1)  # less vLLM's null page

    # -- a request's life ----------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        more_of_session = request.request_id in self.requests
        super().add_request(request)
        if request.sampling_params is not None and request.sampling_params.stop:
            self._with_stop_strings.add(request.request_id)
        if more_of_session:
            return
        # A streaming-input session edits its own past, which a compacted cache cannot follow.
        settings = None if request.resumable else self._rkv_config.resolve(self._asked_for(request))
        self._counters.arrived(settings)
        if settings is not None:
            lengths = make_request_lengths(
                self._rkv_config.granularity, request.num_prompt_tokens, settings, self._manager.block_size
            )
            self._tracked[request.request_id] = TrackedRequest(lengths)
            self._manager.bound(request.request_id, lengths.max_slots)
        self._refuse_if_too_large(request)

    def _refuse_if_too_large(self, request: Request) -> None:
        """Ends a request that the whole pool cannot hold, which would wait for ever, and all behind it.

        There is none unless the server lets max_model_len exceed the pool.
        """
        length = self.max_model_len
        if not request.resumable:  # a streaming-input session may grow that far
            length = min(length, request.num_prompt_tokens + request.max_tokens)
        tracked = self._tracked.get(request.request_id)
        slots = peak_slots(length, tracked.lengths if tracked else None)
        needed = cdiv(slots, self._manager.block_size)
        usable = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null page
        if needed <= usable:
            return
        reason = (
            f"needs {needed} pages of {self._manager.block_size} tokens, and the whole pool has {usable}: "
            "ask for fewer tokens (max_tokens) or for a smaller KV budget"
        )
        logger.warning("Request %s is refused: it %s", request.request_id, reason)
        result = self._result(request) | {"peak_pages": 0, "reason": reason}
        refusal = EngineCoreOutput(
            request.request_id,
            [],
            finish_reason=FinishReason.ERROR,
            kv_transfer_params={RESULT_KEY: result, REFUSAL_KEY: reason},
        )
        self._refusals.append((request.client_index, refusal))
        self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)

    @staticmethod
    def _asked_for(request: Request) -> RequestedSettings:
        if request.sampling_params is None:
            return RequestedSettings()
        try:
            return RequestedSettings.from_extra_args(request.sampling_params.extra_args)
        except ValueError as error:
            # The front end refuses such a request; one that came another way must not stop the engine.
            logger.warning("Request %s: %s; the server's default is used", request.request_id, error)
            return RequestedSettings()

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            self._note_pages(tracked, request)
            tracked.restart()
            self._steps_to_outlook = 0
            self._query_rows.release(request.request_id)
        self._counters.preempted(request.request_id, request.num_computed_tokens)
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        result = self._result(request)
        tracked = self._tracked.pop(request.request_id, None)
        settings = tracked.settings if tracked else None
        if tracked is not None and request.num_output_tokens:
            self._endings.ended(request.num_output_tokens, early=self._ended_itself(request))
            self._steps_to_outlook = 0
        self._counters.ended(request.request_id, settings, result, request.num_tokens)
        self._manager.unbound(request.request_id)
        self._with_stop_strings.discard(request.request_id)
        self._query_rows.release(request.request_id)
        # Connectors are refused at start, so that nothing else answers in this field.
        _, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        return {RESULT_KEY: result}, ec_transfer_params

    def _ended_itself(self, request: Request) -> bool:
        """Whether a request was done before its last allowed token, as others like it may be.

        One whose client went away would have run on. Where the API server found a stop string, it asks for an
        abort too.
        """
        if request.status == RequestStatus.FINISHED_ABORTED:
            return request.request_id in self._with_stop_strings
        return request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_REPETITION)

    def _result(self, request: Request) -> CompactionResult:
        tracked = self._tracked.get(request.request_id)
        page_size = self._manager.block_size
        # Not `num_computed_tokens`, which is 0 for a request that ends while preempted.
        pages_without = cdiv(request.num_tokens - 1, page_size)
        if tracked is None:
            return CompactionResult(
                budget=None,
                buffer=None,
                policy=None,
                compactions=0,
                evicted_tokens=0,
                peak_pages=pages_without,
                pages_without_compaction=pages_without,
                page_size=page_size,
                reason="full cache",
            )
        self._note_pages(tracked, request)
        return CompactionResult(
            budget=tracked.settings.budget,
            buffer=tracked.settings.buffer,
            policy=tracked.settings.policy,
            compactions=tracked.compactions,
            evicted_tokens=tracked.evicted_tokens,
            peak_pages=tracked.peak_pages,
            # A step that was scheduled ahead may have taken one page more.
            pages_without_compaction=max(pages_without, tracked.peak_pages),
            page_size=page_size,
            reason=None if tracked.compactions else "shorter than budget + buffer",
        )

    def _note_pages(self, tracked: TrackedRequest, request: Request) -> None:
        """Pages only grow between two compactions, so that looking before each change sees the peak."""
        tracked.peak_pages = max(tracked.peak_pages, self._manager.num_pages(request.request_id))

    # -- a step --------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._counters.step_begins(time.perf_counter())
        plan = CompactionPlan()
        moves: list[PageMove] = []
        candidates, self._may_be_due = self._may_be_due, []
        for request in candidates:
            tracked = self._tracked.get(request.request_id)
            if tracked is None or not self._is_due(request, tracked):
                continue
            if isinstance(tracked.lengths, PageLengths):
                plan.rounds.append(self._evict_pages(request, tracked, tracked.lengths))
            elif self._make_room(request, tracked):
                compaction, move = self._compact(request, tracked)
                plan.rounds.append(compaction)
                moves.append(move)
        self._manager.release(moves)
        self._held_pages -= sum(len(move.leaving) for move in moves)
        self._look_ahead()
        output: SchedulerOutput = super().schedule(throttle_prefills)
        if output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids:
            self._steps_to_outlook = 0
        if output.preempted_req_ids:
            # Preempted after it was planned: its pages may have a new owner in this very step.
            gone = output.preempted_req_ids
            for planned in plan.rounds:
                if planned.request_id in gone:
                    self._counters.cancelled(planned)
            plan.rounds = [planned for planned in plan.rounds if planned.request_id not in gone]
        for planned in plan.rounds:
            self._tracked[planned.request_id].count(planned)
            self._counters.executed(planned)
        for request_id in self._counters.replaying & output.num_scheduled_tokens.keys():
            end = self.requests[request_id].num_computed_tokens
            self._counters.computed(request_id, end - output.num_scheduled_tokens[request_id], end)
        plan.recordings = self._recordings(output)
        attach_plan(output, plan)
        return output

    def _is_due(self, request: Request, tracked: TrackedRequest) -> bool:
        # Logical; the steps that compute these tokens are all enqueued, whether their output is known or not.
        return request.status == RequestStatus.RUNNING and tracked.lengths.is_due(request.num_computed_tokens)

    def _make_room(self, request: Request, tracked: TrackedRequest) -> bool:
        """Preempts, as vLLM does where slots run out, until there are pages to compact into.

        Waiting for pages instead would move this compaction, and all later ones, to other tokens. It ends: a
        request that runs alone shares no page. Returns False where the request itself had to go.
        """
        while not self._manager.can_compact(request.request_id, tracked.settings.budget):
            if self.policy == SchedulingPolicy.PRIORITY:
                victim = max(self.running, key=lambda running: (running.priority, running.arrival_time))
            else:
                victim = self.running[-1]
            self.running.remove(victim)
            self._counters.preempted_for_room()
            self._preempt_request(victim, time.monotonic())
            # Should it come back in this very step, the V1 runner needs its tokens, as after any pause.
            self.prev_step_scheduled_req_ids.discard(victim.request_id)
            if victim is request:
                self._counters.deferred("no_pages")
                return False
        return True

    def _compact(self, request: Request, tracked: TrackedRequest) -> tuple[TokenCompaction, PageMove]:
        request_id, logical = request.request_id, request.num_computed_tokens
        self._note_pages(tracked, request)
        length = tracked.lengths.physical(logical)
        row = self._query_rows.row_of(request_id) if tracked.settings.needs_queries else -1
        self._query_rows.release(request_id)
        tracked.lengths.compact(logical)
        move = self._manager.compact(request_id, tracked.settings.budget, tracked.lengths.evicted)
        compaction = TokenCompaction(
            request_id=request_id,
            source_pages=move.source_pages,
            target_pages=move.target_pages,
            length=length,
            keep=tracked.settings.budget,
            evicted=tracked.lengths.evicted,
            policy=tracked.settings.policy,
            query_row=row,
        )
        return compaction, move

    def _evict_pages(self, request: Request, tracked: TrackedRequest, lengths: PageLengths) -> PageCompaction:
        request_id, logical = request.request_id, request.num_computed_tokens
        length = lengths.physical(logical)
        row = self._query_rows.row_of(request_id) if tracked.settings.needs_queries else -1
        self._query_rows.release(request_id)
        lengths.compact(logical)
        self._manager.stop_caching(request_id)
        tracked.eviction_id = next(self._sequences)
        return PageCompaction(
            request_id=request_id,
            length=length,
            keep=lengths.physical(logical),
            evicted=lengths.evicted,
            policy=tracked.settings.policy,
            query_row=row,
            eviction_id=tracked.eviction_id,
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._counters.record_durations(durations_of(model_runner_output))
        for report in reports_of(model_runner_output):
            self._learn(report)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        for client_index, refusal in self._refusals:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(refusal)
        self._refusals.clear()
        if self._with_stop_strings:
            self._report_early(output for of_client in outputs.values() for output in of_client.outputs)
        return outputs

    def _report_early(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Stop strings are found in the API server, which then wants nothing more of the request from here:
        each output of one that has any carries its result so far."""
        for output in outputs:
            if output.request_id in self._with_stop_strings:
                result = self._result(self.requests[output.request_id])
                output.kv_transfer_params = {RESULT_KEY: result}

    def _learn(self, report: PageReport) -> None:
        """Returns the pages that left to the pool; every step that read them has run."""
        tracked = self._tracked.get(report.request_id)
        if tracked is None or tracked.eviction_id != report.eviction_id:
            return  # finished, or started again: it has nothing of what is reported
        lengths = tracked.lengths
        if isinstance(lengths, PageLengths) and lengths.leaving:
            request = self.requests[report.request_id]
            self._note_pages(tracked, request)
            self._manager.remove_pages(report.request_id, report.pages)
            self._held_pages -= len(report.pages)
            lengths.confirm_freed()
            self._may_be_due.append(request)

    def _recordings(self, output: SchedulerOutput) -> dict[str, int]:
        """Whose queries to record in this step, and in which row: those that took one to be scheduled."""
        recordings = {}
        for request_id, row in self._query_rows.held():
            if request_id in output.num_scheduled_tokens:
                recordings[request_id] = row
            elif self.requests[request_id].status != RequestStatus.RUNNING:
                # Tried, and not admitted for want of pages: those that run must not wait for its row.
                self._query_rows.release(request_id)
        return recordings

    # -- who is admitted -----------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        """Reckons up what the running requests will hold, if somebody waits for pages."""
        self._admitted = None
        if self._steps_to_outlook:
            self._steps_to_outlook -= 1
            return
        if not self.waiting:
            return
        self._steps_to_outlook = _STEPS_PER_OUTLOOK
        page_size, courses, held_pages, tokens = self._manager.block_size, [], 0, 0
        for request in self.running:
            tracked = self._tracked.get(request.request_id)
            if tracked is not None:
                courses.append(self._course(request, tracked))
                held_pages += cdiv(tracked.lengths.allocated_slots(request.num_computed_tokens), page_size)
                tokens += request.num_output_tokens
        self._held_pages = held_pages
        first = self.waiting.peek_request()
        tracked = self._tracked.get(first.request_id)
        newcomer = None if tracked is None else self._course(first, tracked)
        self._outlook = Outlook(courses, newcomer, self._endings.rate(tokens), page_size)

    def _keep_room(self, request: Request, tracked: TrackedRequest | None) -> None:
        """Sets how many pages vLLM leaves free if it admits a waiting request: for it, and for all before it.

        vLLM asks for waiting requests one after the other, and stops at the first that it does not admit.
        """
        if self._admitted is not None:
            self._outlook.add(self._admitted)
            self._held_pages += cdiv(self._admitted.held, self._manager.block_size)
        self._admitted = course = None if tracked is None else self._course(request, tracked)
        own_pages = 0 if course is None else cdiv(course.held, self._manager.block_size)
        to_come = self._outlook.most_pages(course) - self._held_pages - own_pages
        self.kv_cache_manager.watermark_blocks = self._watermark + max(to_come, 0)

    @staticmethod
    def _course(request: Request, tracked: TrackedRequest) -> Course:
        lengths = tracked.lengths
        left = max(request.max_tokens - request.num_output_tokens, 0)
        if tracked.rounds:
            held = lengths.physical(request.num_computed_tokens) + lengths.eviction_slack
            return Course(
                held, lengths.due_slots + lengths.eviction_slack, lengths.due_slots - lengths.kept_slots, left
            )
        most = peak_slots(request.num_prompt_tokens + request.max_tokens, lengths)
        return Course(min(max(request.num_computed_tokens, request.num_tokens), most), most, 0, left)

    # -- where chunks end ----------------------------------------------------------------------------------

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM's hook for where a chunk ends, asked for running and for waiting requests."""
        tracked = self._tracked.get(request.request_id)
        if request.status != RequestStatus.RUNNING:
            self._keep_room(request, tracked)
        # Most steps of a request are far from its next compaction.
        if tracked is not None and num_computed_tokens + num_new_tokens > tracked.unconstrained_until:
            num_new_tokens = self._end_of_chunk(request, tracked, num_computed_tokens, num_new_tokens)
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _end_of_chunk(
        self, request: Request, tracked: TrackedRequest, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        lengths = tracked.lengths
        tracked.unconstrained_until = lengths.unconstrained_until
        num_new_tokens = lengths.end_of_chunk(num_computed_tokens, num_new_tokens)
        first = lengths.recorded_from
        if (
            tracked.settings.needs_queries
            and num_computed_tokens + num_new_tokens > first
            and not self._query_rows.hold(request.request_id)
        ):
            # Without a row it stays before the window, and waits there for one.
            self._counters.deferred("no_query_row")
            num_new_tokens = max(first - num_computed_tokens, 0)
        if num_computed_tokens + num_new_tokens >= lengths.next_due:
            self._may_be_due.append(request)
        return num_new_tokens

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_hit_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            page_size = self._manager.block_size
            most = tracked.lengths.recorded_from // page_size * page_size
            if num_hit_tokens > most:
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, most)
                num_hit_tokens = most
        return blocks, num_hit_tokens, boundary, diverged

    # -- what is counted -----------------------------------------------------------------------------------

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Called by vLLM at the end of each step, when finished requests have given their pages back."""
        pool = self.kv_cache_manager.block_pool
        pages_held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        self._counters.step_ends(time.perf_counter(), is_idle=not self.requests, pages_held=pages_held)
        tally = self._counters.take()  # also where nobody wants it: it must not grow
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            put_tally(stats, tally)
        return stats

    # -- for tests and operators ---------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises: AssertionError where a page or query row is lost, or lengths, pages and counts disagree."""
        page_size = self._manager.block_size
        for request in self.running:
            tracked = self._tracked.get(request.request_id)
            logical = request.num_computed_tokens
            expected = cdiv(tracked.lengths.allocated_slots(logical) if tracked else logical, page_size)
            held = self._manager.num_pages(request.request_id)
            assert held == expected, f"{request.request_id} holds {held} pages, not {expected}"
        self._query_rows.check_integrity()
        saved = sum(tracked.lengths.evicted // page_size for tracked in self._tracked.values())
        assert self._counters.saved_pages == saved, f"{self._counters.saved_pages} pages saved, not {saved}"
        pool = self.kv_cache_manager.block_pool
        owned = {page.block_id for pages in self._manager.req_to_blocks.values() for page in pages}
        free = pool.get_num_free_blocks()
        assert free + len(owned) + 1 == pool.num_gpu_blocks, (  # vLLM's null block is the one
            f"{free} free + {len(owned)} owned + 1 null is not {pool.num_gpu_blocks}"
        )


class CompactingScheduler(CompactingSchedulerMixin, Scheduler):
    """For engines that wait for each step's tokens."""


class CompactingAsyncScheduler(CompactingSchedulerMixin, AsyncScheduler):
    """For engines that schedule ahead of the tokens."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """What `--scheduler-cls` names: the scheduler that fits the engine's `async_scheduling`."""
    scheduler: Callable[..., Scheduler] = (
        CompactingAsyncScheduler if vllm_config.scheduler_config.async_scheduling else CompactingScheduler
    )
    return scheduler(vllm_config=vllm_config, **kwargs)
