"""Which waiting requests are admitted: those that leave room for what the running ones will grow to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.decisions.pool_forecast import EarlyStopRate, PoolForecast, RequestForecast
from rkv_vllm.decisions.sizing import peak_slots
from rkv_vllm.scheduling.tracked_request import TrackedRequest

#: Steps between two forecasts; an arrival or departure forces one.
_STEPS_PER_FORECAST = 8


class AdmissionControl:
    """Tells vLLM how many pages to leave free when it admits a request.

    Reads the tracked requests, and writes `watermark_blocks` of vLLM's KV cache manager alone.
    """

    def __init__(
        self, kv_cache_manager: KVCacheManager, page_size: int, tracked: Mapping[str, TrackedRequest]
    ) -> None:
        """
        Args:
            kv_cache_manager: vLLM's, whose watermark is set.
            page_size: tokens in a page.
            tracked: the requests with a budget by id, kept up to date by the scheduler.
        """
        self._kv_cache_manager = kv_cache_manager
        self._page_size = page_size
        self._tracked = tracked
        self._operators_watermark: int = kv_cache_manager.watermark_blocks
        self._usable_pages = kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null page
        self.early_stop_rate = EarlyStopRate()
        self._forecast = PoolForecast([], None, 0.0, page_size)  # of the running requests with a budget
        self._held_pages = 0  # lower bound on the pages that they hold
        self._admitted: RequestForecast | None = None  # in this step, if vLLM asks for another
        self._steps_to_forecast = 0

    def refusal(self, request: Request, max_model_len: int) -> str | None:
        """Why a request has to be refused: the whole pool cannot hold it; None where it can.

        It would wait for ever, and all requests behind it. None is refused unless the server lets
        max_model_len exceed the pool.
        """
        length = max_model_len
        if not request.resumable:  # a streaming-input session may grow that far
            length = min(length, request.num_prompt_tokens + request.max_tokens)
        tracked = self._tracked.get(request.request_id)
        needed = self._pages(peak_slots(length, tracked.lengths if tracked else None))
        if needed <= self._usable_pages:
            return None
        return (
            f"needs {needed} pages of {self._page_size} tokens, and the whole pool has {self._usable_pages}: "
            "ask for fewer tokens (max_tokens) or for a smaller KV budget"
        )

    def running_requests_changed(self) -> None:
        """Forces a forecast in the next step: a request came, went or was preempted."""
        self._steps_to_forecast = 0

    def pages_freed(self, pages: int) -> None:
        """Records that running requests gave pages back to the pool."""
        self._held_pages -= pages

    def begin_step(self, running: Iterable[Request], waiting: RequestQueue) -> None:
        """Recomputes the forecast from time to time, if a request is waiting for pages."""
        self._admitted = None
        if self._steps_to_forecast:
            self._steps_to_forecast -= 1
            return
        if not waiting:
            return
        self._steps_to_forecast = _STEPS_PER_FORECAST
        forecasts, held_pages, generated = [], 0, 0
        for request in running:
            tracked = self._tracked.get(request.request_id)
            if tracked is not None:
                forecasts.append(_forecast(request, tracked))
                held_pages += self._pages(tracked.lengths.allocated_slots(request.num_computed_tokens))
                generated += request.num_output_tokens
        self._held_pages = held_pages
        first = waiting.peek_request()
        tracked = self._tracked.get(first.request_id)
        newcomer = None if tracked is None else _forecast(first, tracked)
        self._forecast = PoolForecast(
            forecasts, newcomer, self.early_stop_rate.per_token(generated), self._page_size
        )

    def set_watermark(self, request: Request) -> None:
        """Sets how many pages vLLM leaves free if it admits this request: for its growth and all others'.

        vLLM asks for waiting requests one after the other, and stops at the first that it does not admit.
        """
        if self._admitted is not None:
            self._forecast.add(self._admitted)
            self._held_pages += self._pages(self._admitted.slots_now)
        tracked = self._tracked.get(request.request_id)
        self._admitted = newcomer = None if tracked is None else _forecast(request, tracked)
        own_pages = 0 if newcomer is None else self._pages(newcomer.slots_now)
        to_come = self._forecast.peak_pages(newcomer) - self._held_pages - own_pages
        self._kv_cache_manager.watermark_blocks = self._operators_watermark + max(to_come, 0)

    def _pages(self, slots: int) -> int:
        return num_pages(slots, self._page_size)


def _forecast(request: Request, tracked: TrackedRequest) -> RequestForecast:
    lengths = tracked.lengths
    remaining = max(request.max_tokens - request.num_output_tokens, 0)
    if tracked.rounds:
        return RequestForecast(
            slots_now=lengths.physical(request.num_computed_tokens) + lengths.eviction_slack,
            peak_slots=lengths.due_slots + lengths.eviction_slack,
            cycle_steps=lengths.due_slots - lengths.kept_slots,
            tokens_remaining=remaining,
        )
    peak = peak_slots(request.num_prompt_tokens + request.max_tokens, lengths)
    return RequestForecast(
        slots_now=min(max(request.num_computed_tokens, request.num_tokens), peak),
        peak_slots=peak,
        cycle_steps=0,
        tokens_remaining=remaining,
    )
