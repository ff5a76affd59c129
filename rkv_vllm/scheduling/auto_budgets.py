"""Requests with budget "auto": which of them switch in a step, and what is kept in the pool for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request, RequestStatus

from rkv_vllm.decisions.auto_lengths import AutoLengths
from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.decisions.pressure import NOTICE_MARGIN, Candidate, PoolState, to_switch
from rkv_vllm.observability.metric_table import SwitchCause
from rkv_vllm.scheduling.page_counts import PageCounts
from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.scheduling.tracked_request import TrackedRequest
from rkv_vllm.settings.values import Switch

#: Steps between two counts of the pages that are kept, which only a metric shows.
_STEPS_PER_COUNT = 64


class Order(NamedTuple):
    """Has a request switch, and says why."""

    request: Request
    switch: Switch
    cause: SwitchCause


class AutoBudgets:
    """Finds out when memory is short, and who has to give some back.

    Reads the running requests, their counts and pages; `decisions/pressure.py` decides. Where no request has
    budget "auto" nothing is looked at.
    """

    def __init__(
        self,
        groups: PageGroups,
        pool: BlockPool,
        tracked: Mapping[str, TrackedRequest],
        *,
        usage: float,
        num_drafts: int,
        by_priority: bool,
        final_length: Callable[[Request], int],
    ) -> None:
        """
        Args:
            groups: hold the requests' pages.
            pool: vLLM's.
            tracked: the requests with a budget by id, kept up to date by the scheduler.
            usage: share of the pool that is filled before anybody has to switch.
            num_drafts: drafts that a request verifies in a step, at most; they may take slots before it can
                be ordered to switch.
            by_priority: whether less urgent requests are to switch first.
            final_length: tokens that a request has when it ends at the latest.
        """
        self._groups = groups
        self._pages = groups.pages
        self._pool = pool
        self._usable_pages = pool.num_gpu_blocks - 1  # one is vLLM's null page
        self._tracked = tracked
        self._usage = usage
        self._margin = NOTICE_MARGIN + num_drafts
        self._by_priority = by_priority
        self._final_length = final_length
        self._lengths: dict[str, AutoLengths] = {}
        self._counts = PageCounts(groups, tracked, final_length)
        self._waiting: tuple[Request, int] | None = None  # the next in the queue, and pages that it wants
        self._surplus: dict[int, int] = {}  # in this step, by a newcomer's priority
        self._reserved_pages, self._steps_to_count = 0, 0
        self._running: Sequence[Request] = ()
        self._growth: int | None = None  # in this step, where somebody has asked

    def __bool__(self) -> bool:
        """Whether there is a request with budget "auto", running or waiting."""
        return bool(self._lengths)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._lengths

    # -- a request -----------------------------------------------------------------------------------------

    def arrived(self, request: Request, lengths: RequestLengths) -> None:
        """Keeps the request in mind if it has budget "auto"."""
        if isinstance(lengths, AutoLengths):
            self._lengths[request.request_id] = lengths
            self._counts.notice = max(self._counts.notice, lengths.settings.num_queries + self._margin)

    def ended(self, request_id: str) -> None:
        self._lengths.pop(request_id, None)

    def order_on_arrival(self, request: Request) -> None:
        """Has a request that waits switch once its tokens are computed, if the pool has no room for more.

        It would have to be preempted before an order could take effect, and would come back to the same pool.
        """
        lengths = self._lengths.get(request.request_id)
        if lengths is None:
            return
        tracked = self._tracked[request.request_id]
        lengths.withdraw_order()  # of a step in which it was not admitted
        tracked.unconstrained_until = 0
        if lengths.is_undecided:
            later = request.num_tokens + self._counts.notice
            switch = lengths.switch_on_arrival(request.num_tokens)
            if switch <= later and self._counts.missing(request, later) > self._pool.get_num_free_blocks():
                # Half of a prefix that others hold too would have to be copied.
                half = lengths.half_of(lengths.slots_on_arrival(request.num_tokens))
                kept = lengths.settings.budget if tracked.hit_pages else half
                tracked.order_switch(Switch(switch, kept), "arrival")
        self._groups.set_max_slots(request.request_id, lengths.most_slots(request.num_tokens))

    def missing_pages(self, request: Request, num_tokens: int) -> int:
        """See `PageCounts.missing`."""
        return self._counts.missing(request, num_tokens)

    def reserved_slots(self, request: Request, num_computed_tokens: int) -> int:
        """Slots that are kept for a request with budget "auto", whatever others do."""
        uncomputed_until = request.num_tokens if num_computed_tokens + 1 < request.num_tokens else 0
        reserved = self._lengths[request.request_id].reserved_slots(uncomputed_until, self._counts.notice)
        return min(reserved, self._final_length(request))

    @property
    def reserved_pages(self) -> int:
        """Pages that are kept for running requests with budget "auto", counted now and then."""
        return self._reserved_pages if self._lengths else 0

    # -- a step --------------------------------------------------------------------------------------------

    def orders(self, running: Sequence[Request]) -> list[Order]:
        """Who has to switch, before rounds are planned; the first first.

        For the next in the queue nobody switches who is more urgent.
        """
        self._surplus.clear()
        self._running, self._growth = running, None
        waiting, self._waiting = self._waiting, None
        if not self._lengths:
            return []
        if waiting is not None and waiting[0].status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            waiting = None
        if not self._steps_to_count:
            self._steps_to_count = _STEPS_PER_COUNT
            autos = (each for each in running if each.request_id in self._lengths)
            self._reserved_pages = sum(map(self._reserved, autos))
        self._steps_to_count -= 1
        state = PoolState(
            usable=self._usable_pages,
            free=self._pool.get_num_free_blocks(),
            growth=self._most_growth(),
            wanted=0 if waiting is None else waiting[1],
        )
        if not state.shortage(self._usage):
            return []
        state = replace(state, growth=sum(self._counts.net_growth(request) for request in running))
        if not (with_waiting := state.shortage(self._usage)):
            return []
        candidates = list(filter(None, (self._candidate(*each) for each in enumerate(running))))
        filled = int(self._usable_pages * self._usage)
        for_growth = to_switch(candidates, replace(state, wanted=0).shortage(self._usage), filled)
        chosen: list[tuple[Candidate, SwitchCause]] = [(each, "growth") for each in for_growth]
        if waiting is not None:
            with_waiting -= sum(each.saved_pages for each in for_growth)
            urgency = self._priority(waiting[0])
            others = [each for each in candidates if each.priority >= urgency and each not in for_growth]
            chosen += [(each, "waiting") for each in to_switch(others, with_waiting, filled)]
        return [Order(running[each.arrival], each.switch, cause) for each, cause in chosen]

    def wanted(self, request: Request, pages: int) -> None:
        """Records that the next in the queue is admitted once so many pages are free."""
        self._waiting = request, pages

    def admitted(self, request: Request) -> None:
        """Counts a request that vLLM has admitted in this step among those that run."""
        if self._lengths:
            if self._growth is not None:
                self._growth += self._counts.growth(request)
            for priority in self._surplus:
                self._surplus[priority] += self._surplus_of(request, priority)

    def surplus(self, priority: int) -> int:
        """Pages of running requests with budget "auto" beyond those that are kept for them.

        Negative where they have less. For a newcomer of this priority nothing is kept for those that are less
        urgent.
        """
        if not self._lengths:
            return 0
        if priority not in self._surplus:
            self._surplus[priority] = sum(self._surplus_of(request, priority) for request in self._running)
        return self._surplus[priority]

    def _surplus_of(self, request: Request, priority: int) -> int:
        if request.request_id not in self._lengths:
            return 0
        surplus = self._counts.own(request.request_id) - self._reserved(request)
        surplus -= self._groups.others.growth(request.num_computed_tokens, self._final_length(request))
        return max(surplus, 0) if self._priority(request) > priority else surplus

    def _reserved(self, request: Request) -> int:
        return self._pages(self.reserved_slots(request, request.num_computed_tokens))

    @property
    def growth(self) -> int:
        """Pages that the running requests take within the notice, before any round."""
        if self._growth is None:
            self._growth = sum(self._counts.growth(request) for request in self._running)
        return self._growth

    def _most_growth(self) -> int:
        """No less than `growth`, in a fraction of the time; enough where memory is far from short."""
        to_compute = sum(max(each.num_tokens - each.num_computed_tokens, 0) for each in self._running)
        # A page each beside what the tokens fill: they may begin anywhere in one.
        tokens = to_compute + len(self._running) * self._counts.notice
        slots = tokens + len(self._running) * self._groups.page_size
        return self._pages(slots) + self._groups.others.pages_of_many(tokens, len(self._running))

    def _candidate(self, arrival: int, request: Request) -> Candidate | None:
        """A running request as `decisions/pressure.py` has to know it; None where it cannot be ordered."""
        lengths = self._lengths.get(request.request_id)
        logical = request.num_computed_tokens
        if lengths is None or not lengths.is_undecided or logical + 1 < request.num_tokens:
            return None
        switch = lengths.earliest_switch(logical)
        # Where the switch is further away, it has no more than what is kept for it. Nothing is read after its
        # last but one token.
        if switch > logical + lengths.settings.num_queries or switch + 1 >= self._final_length(request):
            return None
        later = self._pages(lengths.physical(min(logical + self._counts.notice, self._final_length(request))))
        shared = self._groups.num_pages(request.request_id) - self._counts.own(request.request_id)
        kept, after = self._step(lengths, switch, later - shared, logical + self._counts.notice - switch)
        return Candidate(
            request_id=request.request_id,
            priority=self._priority(request),
            arrival=arrival,
            length=lengths.physical(switch),
            saved_pages=later - shared - after,
            switch=Switch(switch, kept),
            tokens_left=self._final_length(request) - logical,
        )

    def _step(self, lengths: AutoLengths, switch: int, own_pages: int, since: int) -> tuple[int, int]:
        """Tokens that a switch leaves, and pages that they fill with `since` more: half of what it holds, or
        its budget where others hold so much of it that half saves nothing."""
        half = lengths.half_of(lengths.physical(switch))
        kept = half if self._pages(half + since) < own_pages else lengths.settings.budget
        return kept, self._pages(kept + since)

    def _priority(self, request: Request) -> int:
        """The greater the less urgent; the same for all where vLLM preempts the newest."""
        return request.priority if self._by_priority else 0
