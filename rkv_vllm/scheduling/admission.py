"""Which waiting requests are admitted: those that leave room for what the running ones will grow to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus

from rkv_vllm.decisions.pool_forecast import EarlyStopRate, PoolForecast, RequestForecast
from rkv_vllm.decisions.sizing import peak_slots
from rkv_vllm.scheduling.auto_budgets import AutoBudgets
from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.scheduling.too_large import too_large
from rkv_vllm.scheduling.tracked_request import TrackedRequest

#: Steps between two forecasts; an arrival or departure forces one.
_STEPS_PER_FORECAST = 8
#: How much longer a prompt may take than alone: others are computed beside it.
_PROMPT_DELAY = 4
#: How a request ended -> whether it was done before its last allowed token. All other ends, such as that of a
#: client who left, say nothing of how long answers are. (Where the API server finds a stop string it aborts
#: the request too: the two cannot be told apart here.)
_ENDS_EARLY = {
    RequestStatus.FINISHED_STOPPED: True,
    RequestStatus.FINISHED_REPETITION: True,
    RequestStatus.FINISHED_LENGTH_CAPPED: False,
}


@dataclass(slots=True)
class _Outlook:
    """What the running requests that a newcomer has to leave room for will hold.

    Attributes:
        forecast: of their own pages: those that nobody else holds.
        requests: who they are.
        shared_pages: how many of the pages that they hold together are not their own.
        held_pages: pages that they hold in this step; None: not counted yet.
    """

    forecast: PoolForecast
    requests: list[Request]
    shared_pages: int
    held_pages: int | None = None


class AdmissionControl:
    """Tells vLLM how many pages to leave free when it admits a request.

    A request with its full cache is admitted as in stock vLLM. One with a budget leaves room for the growth
    of all that run with a budget, for as long as it will be there itself; under vLLM's policy `priority` for
    the growth of those that would not be preempted for it. One with budget "auto" counts as one with its
    min_budget: who has more can be made to give it back.

    Reads the tracked requests and their pages, and writes `watermark_blocks` of vLLM's KV cache manager.
    """

    def __init__(
        self,
        kv_cache_manager: KVCacheManager,
        groups: PageGroups,
        tracked: Mapping[str, TrackedRequest],
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        by_priority: bool,
        auto_usage: float,
        num_drafts: int,
    ) -> None:
        """
        Args:
            kv_cache_manager: vLLM's, whose watermark is set.
            groups: hold the requests' pages.
            tracked: the requests with a budget by id, kept up to date by the scheduler.
            max_model_len: tokens of the longest request.
            max_num_batched_tokens: tokens of the largest step.
            by_priority: whether vLLM preempts those of lower priority first, and not the newest.
            auto_usage: share of the pool that is filled before requests with budget "auto" switch.
            num_drafts: drafts that a request verifies in a step, at most.
        """
        self._kv_cache_manager = kv_cache_manager
        self._groups = groups
        self._tracked = tracked
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._by_priority = by_priority
        self._operators_watermark: int = kv_cache_manager.watermark_blocks
        self._pool = kv_cache_manager.block_pool
        self._usable_pages = self._pool.num_gpu_blocks - 1  # one is vLLM's null page
        self.autos = AutoBudgets(
            groups,
            self._pool,
            tracked,
            usage=auto_usage,
            num_drafts=num_drafts,
            by_priority=by_priority,
            final_length=self.final_length,
        )
        self.early_stop_rate = EarlyStopRate()
        self._running: Sequence[Request] = ()
        self._outlooks: dict[int, _Outlook] = {}  # by the newcomer's priority; 0 for all where it is ignored
        self._asked: tuple[Request, int, RequestForecast | None] | None = (
            None  # in this step, with its priority
        )
        self._passed_over = False  # whether somebody was asked for in this step and not admitted
        self._steps_to_forecast = 0

    def refusal(self, request: Request) -> str | None:
        """Why a request has to be refused: the whole pool cannot hold it; None where it can."""
        # A streaming-input session may grow as far as the model allows.
        length = self._max_model_len if request.resumable else self.final_length(request)
        return too_large(
            request, length, self._tracked.get(request.request_id), self._groups, self._usable_pages
        )

    def running_requests_changed(self) -> None:
        """Forces a forecast in the next step: a request came, went or was preempted."""
        self._steps_to_forecast = 0

    def request_ended(self, request: Request) -> None:
        """Learns from a request with a budget how long answers are."""
        self.running_requests_changed()
        early = _ENDS_EARLY.get(request.status)
        if early is not None:
            self.early_stop_rate.observe(request.num_output_tokens, early=early)

    def begin_step(self, running: Sequence[Request]) -> None:
        """Has the forecasts made again from time to time, once vLLM asks for a request that waits for pages.

        Args:
            running: vLLM's list, to which it appends whom it admits.
        """
        self._running = running
        self._asked, self._passed_over = None, False
        if self._steps_to_forecast:
            self._steps_to_forecast -= 1
            for outlook in self._outlooks.values():
                outlook.held_pages = None
        else:
            self._steps_to_forecast = _STEPS_PER_FORECAST
            self._outlooks.clear()

    def set_watermark(self, request: Request, num_computed_tokens: int) -> None:
        """Sets how many pages vLLM leaves free if it admits this request: for its growth and that of others.

        vLLM asks for waiting requests one after the other. It stops at the first that finds no pages; one
        that may compute nothing yet, for want of a query row, it passes over from release 0.33 on.

        Args:
            request: who waits.
            num_computed_tokens: that it would start with, from the prefix cache.
        """
        self._count_if_admitted()
        tracked = self._tracked.get(request.request_id)
        priority, to_come = self._priority(request), 0
        if tracked is None:
            self._asked = request, priority, None
        else:
            to_come = self._to_come(request, tracked, priority, num_computed_tokens)
        watermark = max(to_come, 0)
        if self.autos:
            to_come -= self.autos.surplus(priority)
            watermark = max(to_come, self.autos.growth)
            needed = self.autos.missing_pages(request, request.num_tokens)
            if not self._passed_over and needed + to_come <= self._pool.get_num_free_blocks():
                self.autos.wanted(request, needed)
        self._kv_cache_manager.watermark_blocks = self._operators_watermark + watermark

    def _to_come(
        self, request: Request, tracked: TrackedRequest, priority: int, num_computed_tokens: int
    ) -> int:
        """Pages that a newcomer, and those with a fixed budget that it leaves room for, have yet to take."""
        newcomer = self._forecast(request, tracked, num_computed_tokens, tracked.hit_pages)
        self._asked = request, priority, newcomer
        outlook = self._outlooks.get(priority)
        if outlook is None:
            rivals = [each for each in self._running if self._priority(each) <= priority]
            outlook = self._outlooks[priority] = self._look_ahead(rivals, newcomer)
        if outlook.held_pages is None:
            outlook.held_pages = sum(map(self._held_pages, outlook.requests))
        # Hit pages that one request holds will no longer be its own.
        own_pages = outlook.held_pages - outlook.shared_pages - tracked.hit_pages_of_one
        others = self._groups.others.most_pages(request.num_tokens)
        own_pages += self._pages(newcomer.slots_now) - newcomer.shared_pages + others
        return outlook.forecast.peak_pages(newcomer) - own_pages

    def _count_if_admitted(self) -> None:
        """Counts the newcomer of whom vLLM asked before, if it runs now, among those that run."""
        if self._asked is None:
            return
        request, its_priority, forecast = self._asked
        self._asked = None
        if request.status != RequestStatus.RUNNING:
            self._passed_over = True
            return
        self.autos.admitted(request)
        if forecast is None or request.request_id in self.autos:
            return
        for priority, outlook in self._outlooks.items():
            if its_priority <= priority:
                outlook.forecast.add(forecast)
                outlook.requests.append(request)
                tracked = self._tracked[request.request_id]
                outlook.shared_pages += forecast.shared_pages + tracked.hit_pages_of_one
                if outlook.held_pages is not None:
                    outlook.held_pages += self._held_pages(request)

    def _look_ahead(self, rivals: Sequence[Request], newcomer: RequestForecast) -> _Outlook:
        forecasts: dict[Request, RequestForecast] = {}
        generated = 0
        for request in rivals:
            tracked = self._tracked.get(request.request_id)
            if tracked is not None and request.request_id not in self.autos:
                shared = 0 if tracked.rounds else self._groups.num_shared_pages(request.request_id)
                forecasts[request] = self._forecast(request, tracked, request.num_computed_tokens, shared)
                generated += request.num_output_tokens
        return _Outlook(
            forecast=PoolForecast(
                list(forecasts.values()),
                newcomer,
                self.early_stop_rate.per_token(generated),
                self._groups.page_size,
                self._max_model_len,
                self._groups.num_compacted,
            ),
            requests=list(forecasts),
            shared_pages=sum(each.shared_pages for each in forecasts.values()),
        )

    def _forecast(
        self, request: Request, tracked: TrackedRequest, num_computed_tokens: int, shared_pages: int
    ) -> RequestForecast:
        lengths = tracked.lengths
        final_length = self.final_length(request)
        to_compute = max(request.num_tokens - num_computed_tokens, 0)
        prompt_steps = cdiv(to_compute, self._max_num_batched_tokens)
        steps_remaining = prompt_steps + max(final_length - request.num_tokens, 0)
        due_slots = lengths.due_slots + lengths.eviction_slack
        other_pages = self._groups.others.most_pages(final_length)
        if tracked.rounds:
            return RequestForecast(
                slots_now=lengths.physical(num_computed_tokens) + lengths.eviction_slack,
                peak_slots=due_slots,
                cycle_steps=lengths.due_slots - lengths.kept_slots,
                steps_remaining=steps_remaining,
                other_pages=other_pages,
            )
        if request.request_id in self.autos:
            peak = self.autos.reserved_slots(request, num_computed_tokens)
        else:
            peak = peak_slots(final_length, lengths)
        return RequestForecast(
            slots_now=min(max(num_computed_tokens, request.num_tokens), peak),
            peak_slots=peak,
            cycle_steps=0,
            steps_remaining=steps_remaining,
            due_slots=due_slots if final_length > lengths.next_due else 0,
            shared_pages=shared_pages,
            other_pages=other_pages,
            prompt_steps=_PROMPT_DELAY * prompt_steps,
        )

    def _priority(self, request: Request) -> int:
        """The greater the less urgent; the same for all where vLLM preempts the newest."""
        return request.priority if self._by_priority else 0

    def final_length(self, request: Request) -> int:
        """Tokens that the request has when it ends at the latest."""
        return min(request.num_prompt_tokens + request.max_tokens, self._max_model_len)

    def _held_pages(self, request: Request) -> int:
        """Pages of a running request, in all groups."""
        others = self._groups.others.num_pages(request.num_computed_tokens)
        return self._groups.num_pages(request.request_id) + others

    def _pages(self, slots: int) -> int:
        return self._groups.pages(slots)
