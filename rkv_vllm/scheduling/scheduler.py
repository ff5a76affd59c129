"""vLLM's schedulers with compaction: rounds are planned from counts, before vLLM schedules the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from rkv_vllm.decisions.auto_lengths import make_request_lengths
from rkv_vllm.decisions.messages import (
    REFUSAL_KEY,
    RESULT_KEY,
    CompactionPlan,
    CompactionResult,
    attach_plan,
    durations_of,
    put_tally,
    reports_of,
)
from rkv_vllm.decisions.query_rows import QueryRows, num_query_rows
from rkv_vllm.host.compatibility import refuse_unsupported
from rkv_vllm.host.process_end import skip_last_collections_of_engine
from rkv_vllm.observability.tally import MetricTally
from rkv_vllm.scheduling.admission import AdmissionControl
from rkv_vllm.scheduling.block_manager import register_compacting_spec
from rkv_vllm.scheduling.page_groups import page_groups
from rkv_vllm.scheduling.prefix_cache import shorter_hit
from rkv_vllm.scheduling.request_settings import settings_of
from rkv_vllm.scheduling.round_planner import RoundPlanner
from rkv_vllm.scheduling.tracked_request import TrackedRequest, full_cache_result
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.requested import CannotBeServed

# The mixin is put before either of vLLM's schedulers; the type checker is told of what they share.
if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object

logger = init_logger(__name__)


class CompactingSchedulerMixin(_Scheduler):
    """Translates vLLM's calls for those who decide; put before one of vLLM's schedulers.

    In each step, before vLLM decides anything, `RoundPlanner` shortens every running request that is due, so
    that the freed pages serve this step's allocations; the workers execute the plan first thing in the step.
    `AdmissionControl` keeps room for what the running requests will come to hold.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The registry is asked for the manager class while the base class is being built.
        register_compacting_spec()
        super().__init__(*args, **kwargs)
        vllm_config: VllmConfig = self.vllm_config
        refuse_unsupported(vllm_config)
        skip_last_collections_of_engine()
        self._rkv_config = RkvConfig.from_additional_config(vllm_config.additional_config)
        self._most_rejected: int = self.num_spec_tokens * vllm_config.max_concurrent_batches  # drafts
        self._groups = page_groups(self.kv_cache_manager, vllm_config, self._rkv_config)
        self._tracked: dict[str, TrackedRequest] = {}
        self._with_stop_strings: set[str] = set()
        self._refusals: list[tuple[int, EngineCoreOutput]] = []  # with the client that asked
        pool_pages = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # less vLLM's null page
        self._tally = MetricTally(self._groups.page_size, pool_pages, self._groups.num_compacted)
        self._query_rows = QueryRows(num_query_rows(vllm_config.scheduler_config.max_num_seqs))
        self._admission = AdmissionControl(
            self.kv_cache_manager,
            self._groups,
            self._tracked,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_scheduled_tokens,
            by_priority=self.policy == SchedulingPolicy.PRIORITY,
            auto_usage=self._rkv_config.auto_usage,
            num_drafts=self.num_spec_tokens,
        )
        self._planner = RoundPlanner(
            granularity=self._rkv_config.granularity,
            requests=self.requests,
            tracked=self._tracked,
            groups=self._groups,
            query_rows=self._query_rows,
            tally=self._tally,
            preempt_one=self._preempt_one,
            final_length=self._admission.final_length,
            has_drafts=self.num_spec_tokens > 0,
        )

    # -- a request's life ----------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        more_of_session = request.request_id in self.requests
        super().add_request(request)
        if request.request_id not in self.requests:
            return  # a streaming-input session that was closed
        if request.sampling_params is not None and request.sampling_params.stop:
            self._with_stop_strings.add(request.request_id)
        if more_of_session:
            return
        reason, settings = None, None
        try:
            settings = settings_of(request, self._rkv_config, self._admission.final_length(request))
        except CannotBeServed as error:
            reason = f"cannot be served: {error}"
        self._tally.arrived(settings)
        if settings is not None:
            lengths = make_request_lengths(
                self._rkv_config.granularity, request.num_prompt_tokens, settings, self._groups.page_size
            )
            self._tracked[request.request_id] = TrackedRequest(lengths)
            self._groups.set_max_slots(request.request_id, lengths.most_slots(request.num_tokens))
            self._admission.autos.arrived(request, lengths)
        reason = reason or self._admission.refusal(request)
        if reason is not None:
            self._refuse(request, reason)

    def _refuse(self, request: Request, reason: str) -> None:
        logger.warning("Request %s is refused: it %s", request.request_id, reason)
        result = self._result(request) | {"peak_pages": 0, "reason": reason}
        said = {RESULT_KEY: result, REFUSAL_KEY: reason}
        refusal = EngineCoreOutput(
            request.request_id, [], finish_reason=FinishReason.ERROR, kv_transfer_params=said
        )
        self._refusals.append((request.client_index, refusal))
        self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            tracked.update_peak_pages(self._groups.num_pages(request.request_id))
            tracked.restart()
            self._groups.set_max_slots(request.request_id, tracked.lengths.most_slots(request.num_tokens))
            self._admission.running_requests_changed()
            self._planner.forget(request.request_id)
        self._tally.preempted(request.request_id, request.num_computed_tokens)
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _preempt_one(self) -> Request:
        """Preempts the request that vLLM would preempt next where slots run out."""
        if self.policy == SchedulingPolicy.PRIORITY:
            victim = max(self.running, key=lambda running: (running.priority, running.arrival_time))
        else:
            victim = self.running[-1]
        self.running.remove(victim)
        self._preempt_request(victim, time.monotonic())
        # Should it come back in this very step, the V1 runner needs its tokens, as after any pause.
        self.prev_step_scheduled_req_ids.discard(victim.request_id)
        return victim

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        result = self._result(request)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None:
            self._admission.request_ended(request)
            self._admission.autos.ended(request.request_id)
        settings = tracked.settings if tracked else None
        self._tally.ended(request.request_id, settings, result, request.num_tokens)
        self._groups.forget_max_slots(request.request_id)
        self._with_stop_strings.discard(request.request_id)
        self._planner.forget(request.request_id)
        # Connectors, which answer in this field too, are refused at start.
        _, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        return {RESULT_KEY: result}, ec_transfer_params

    def _result(self, request: Request) -> CompactionResult:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return full_cache_result(request, self._groups)
        tracked.update_peak_pages(self._groups.num_pages(request.request_id))
        return tracked.result(request, self._groups)

    # -- a step --------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._tally.step_begins(time.perf_counter())
        self._planner.order_switches(self._admission.autos.orders(self.running))
        rounds = self._planner.plan_rounds()
        self._planner.release_pages()
        self._admission.begin_step(self.running)
        output: SchedulerOutput = super().schedule(throttle_prefills)
        if output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids:
            self._admission.running_requests_changed()
        if output.preempted_req_ids:
            rounds = self._planner.drop_preempted(rounds, output.preempted_req_ids)
        self._planner.commit(rounds)
        for request_id in self._tally.replaying & output.num_scheduled_tokens.keys():
            end = self.requests[request_id].num_computed_tokens
            self._tally.computed(request_id, end - output.num_scheduled_tokens[request_id], end)
        attach_plan(output, CompactionPlan(rounds, self._planner.captures(output)))
        return output

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM's hook for where a chunk ends, asked for running and for waiting requests."""
        if request.status != RequestStatus.RUNNING:
            self._admission.set_watermark(request, num_computed_tokens)
            self._admission.autos.order_on_arrival(request)
            if num_computed_tokens + num_new_tokens > request.num_tokens:
                return num_new_tokens  # see `TrackedRequest.most_hit_tokens`
        tracked = self._tracked.get(request.request_id)
        # Asked for every request in every step, most of which are far from the request's next round.
        if tracked is not None and num_computed_tokens + num_new_tokens > tracked.unconstrained_until:
            num_new_tokens = self._planner.end_of_chunk(request, tracked, num_computed_tokens, num_new_tokens)
        return super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)

    def _get_local_prefix_cache_hit(
        self, request: Request, *bounds: int | None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_hit_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request, *bounds)
        tracked = self._tracked.get(request.request_id)
        if tracked is not None:
            most = tracked.most_hit_tokens(num_hit_tokens, request.num_tokens, self.num_spec_tokens)
            if num_hit_tokens > most:
                blocks, num_hit_tokens = shorter_hit(self.kv_cache_manager, request, most)
            tracked.found_in_cache(self._groups.holders(blocks.blocks))
            boundary = boundary or tracked.resumes_at(request.num_tokens)
        return blocks, num_hit_tokens, boundary, diverged

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._tally.record_durations(durations_of(model_runner_output))
        for report in reports_of(model_runner_output):
            self._planner.apply_page_report(report)
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
        """Puts the result so far on each output of a request with stop strings.

        Those are found in the API server, which then wants nothing more of the request from here.
        """
        for output in outputs:
            if output.request_id in self._with_stop_strings:
                result = self._result(self.requests[output.request_id])
                output.kv_transfer_params = {RESULT_KEY: result}

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Called by vLLM at the end of each step, when finished requests have given their pages back."""
        pool = self.kv_cache_manager.block_pool
        pages_held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        now, idle, reserved = time.perf_counter(), not self.requests, self._admission.autos.reserved_pages
        self._tally.step_ends(now, is_idle=idle, pages_held=pages_held, reserved_pages=reserved)
        tally = self._tally.take()  # also where nobody wants it: it must not grow
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            put_tally(stats, tally)
        return stats

    # -- for tests and operators ---------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises: AssertionError where a page or query row is lost, or lengths, pages and counts disagree."""
        for request in self.running:
            tracked = self._tracked.get(request.request_id)
            logical = request.num_computed_tokens
            slots = tracked.lengths.allocated_slots(logical) if tracked else logical
            self._groups.check_pages(request.request_id, slots, slots + self._most_rejected)
        self._groups.check_integrity()
        self._query_rows.check_integrity()
        saved = sum(self._groups.whole_pages(each.lengths.evicted) for each in self._tracked.values())
        assert self._tally.saved_pages == saved, f"{self._tally.saved_pages} pages saved, not {saved}"


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
