"""What requests with a budget will hold of the pool in the steps to come (pure arithmetic).

A request with a budget starts small, grows to budget + buffer, and from then on goes up and down between the
two, in cycles of `buffer` steps:

    slots
    peak_slots |         /|    /|    /|
               |       /  |  /  |  /  |
               |     /    |/    |/    |/       one cycle: cycle_steps
               |   /      ^ compaction
               | / slots_now
               +----------------------------> steps

vLLM admits whatever fits at the moment, so that a full pool would keep preempting: the newest request gives
way to the growth of others, comes back once some page is free, and gives way again. What a request will hold
is known here, so that a new one can wait until there is room for all, for as long as it will be there itself:
one that is gone before the others have grown takes nothing from them.

Requests with a common prefix share its pages until each of them is compacted, which needs pages of its own.
So what is counted of a request are its own pages: those that nobody else holds.

A request ends at the latest with its last allowed token. Those that end before are taken to do so at a
constant rate, which is learnt: many workloads end most requests long before a generous budget is full, and
room kept for all of it would stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

_Ints: TypeAlias = npt.NDArray[np.int64]
_Floats: TypeAlias = npt.NDArray[np.float64]

#: Intervals within the next compaction cycle, and after it.
_INTERVALS_IN_NEXT_CYCLE, _INTERVALS_AFTER = 64, 64
#: From one to the next of the intervals that reach into the far future, and are short in the near one.
_GROWTH_OF_INTERVALS = 1.5
#: Exponential decay of what was learnt, per finished request.
_DECAY_PER_REQUEST = 1 / 256


@dataclass(frozen=True, slots=True)
class RequestForecast:
    """KV slots, in tokens, that one request will hold.

    Attributes:
        slots_now: before this step; for a request that was never compacted, with all of its prompt.
        peak_slots: right before its next compaction, or when it ends.
        cycle_steps: steps from one compaction to the next, and slots evicted in each; 0 before the first.
        steps_remaining: steps after which it will have ended.
        due_slots: right before each compaction after its next one; 0 where that never comes.
        shared_pages: pages that others hold too, until its next compaction.
        other_pages: that it holds at most for layers which are not compacted.
        prompt_steps: steps in which a prompt longer than `due_slots` is still held whole.
    """

    slots_now: int
    peak_slots: int
    cycle_steps: int
    steps_remaining: int
    due_slots: int = 0
    shared_pages: int = 0
    other_pages: int = 0
    prompt_steps: int = 0


class EarlyStopRate:
    """The rate at which requests end before their last allowed token, learnt from those that ended."""

    def __init__(self) -> None:
        self._early = 0.0
        self._tokens = 0.0

    def observe(self, num_tokens: int, *, early: bool) -> None:
        """Learns from a finished request that generated `num_tokens`."""
        keep = 1.0 - _DECAY_PER_REQUEST
        self._early = self._early * keep + early
        self._tokens = self._tokens * keep + num_tokens

    def per_token(self, running_tokens: int) -> float:
        """Early stops per generated token, where the running requests have generated `running_tokens`.

        A low estimate: two standard deviations below the n stops seen, and so 0 for the first four.
        """
        return max(self._early - 2.0 * self._early**0.5, 0.0) / max(self._tokens + running_tokens, 1.0)


class PoolForecast:
    """Upper estimate of the pages that the running requests have of their own in each future interval.

    Requests that were compacted rise and fall. Where they do so at different times, their sum hardly moves;
    where they were started together, all peak together.

    Shapes: I intervals, I1 of them within the next cycle; R requests.
    """

    def __init__(
        self,
        requests: Sequence[RequestForecast],
        newcomer: RequestForecast | None,
        early_stops: float,
        page_size: int,
        horizon: int,
        groups: int = 1,
    ) -> None:
        """Looks ahead closely while those that run and the first newcomer grow, and coarsely after that.

        Args:
            requests: those that run.
            newcomer: the next to be asked for; not counted.
            early_stops: rate of early stops per token.
            page_size: tokens in a page.
            horizon: steps in which any newcomer may grow.
            groups: of layers that are compacted, each of which has pages of its own.
        """
        self._page_size, self._groups, self._early_stops = page_size, groups, early_stops
        cycling = _columns([request for request in requests if request.cycle_steps])
        growing = _columns([request for request in requests if not request.cycle_steps])
        self._longest_cycle = int(cycling.cycle_steps.max(initial=1))
        stride = max(page_size // 8, self._longest_cycle // _INTERVALS_IN_NEXT_CYCLE, 1)
        growth = (growing.peak_slots - growing.slots_now).ravel()  # [R growing], in steps as well as slots
        if newcomer is not None:
            growth = np.append(growth, newcomer.peak_slots - newcomer.slots_now)
        next_cycle = np.arange(stride, self._longest_cycle + stride, stride)  # [I1]
        after = self._ends_after(int(next_cycle[-1]), growth, horizon)
        self._ends = np.concatenate((next_cycle, after))  # [I], last step of each
        self._begins = np.concatenate(([0], self._ends[:-1]))  # [I], in steps from now

        low = cycling.peak_slots - cycling.cycle_steps  # [R, 1], right after a compaction
        phase = (cycling.slots_now - low + self._begins[: next_cycle.size]) % cycling.cycle_steps  # [R, I1]
        in_next_cycle = self._pages(np.minimum(low + phase + stride, cycling.peak_slots))
        in_next_cycle = in_next_cycle + cycling.other_pages
        # Where in its later cycles a request will be is not looked for: it is taken to be where all of them
        # together are at their largest in the next cycle. A part of them may peak at another moment.
        at_peak = in_next_cycle[:, [in_next_cycle.sum(axis=0).argmax()]]  # [R, 1]
        pages = np.concatenate(
            (in_next_cycle, np.tile(at_peak, self._ends.size - next_cycle.size)), axis=1
        )  # [R, I]
        # Two standard deviations of a request's place in its cycle, in pages.
        deviation = 2 * cycling.cycle_steps * groups / page_size / 12**0.5  # [R, 1]
        limit = self._pages(cycling.peak_slots) + cycling.other_pages  # [R, 1]
        self._sums = self._sum(cycling, pages, limit, deviation) + self._grown(growing)  # [3, I]

    def peak_pages(self, newcomer: RequestForecast | None = None) -> int:
        """The largest estimate of all intervals, or of those in which a newcomer is there too."""
        sums = self._sums
        if newcomer is not None:
            sums = self._with(newcomer)[:, self._begins < max(newcomer.steps_remaining, 1)]
        mean, variance, limit = sums
        return int(np.ceil(np.minimum(mean + np.sqrt(variance), limit).max()))

    def add(self, newcomer: RequestForecast) -> None:
        """Counts a request that was never compacted among those that run."""
        self._sums = self._with(newcomer)

    def _ends_after(self, next_cycle_end: int, growth: _Ints, horizon: int) -> _Ints:
        """Last steps of the intervals after the next cycle: [I - I1].

        Evenly spaced, and where some request stops growing: several may have been started together. Others
        get longer and longer: what is near matters to a newcomer that is soon gone.
        """
        num_longer = int(np.log(max(horizon, 2)) / np.log(_GROWTH_OF_INTERVALS)) + 2
        ends = (_GROWTH_OF_INTERVALS ** np.arange(num_longer)).astype(np.int64)
        if growth.size:
            even = np.linspace(self._longest_cycle, growth.max(), _INTERVALS_AFTER // 2).astype(np.int64)
            quantiles = np.quantile(growth, np.linspace(0, 1, _INTERVALS_AFTER // 2), method="nearest")
            ends = np.concatenate((ends, even, quantiles))
        ends = np.unique(ends)
        return ends[ends > next_cycle_end]

    def _with(self, newcomer: RequestForecast) -> _Floats:
        return self._sums + self._grown(_columns([newcomer]))

    def _grown(self, requests: _Columns) -> _Floats:
        """[3, I] for requests that were never compacted.

        From their first compaction on, which copies what was shared, they are taken to be as large as right
        before a later one.
        """
        slots = np.minimum(requests.slots_now + self._ends, requests.peak_slots)  # [R, I]
        before = self._pages(slots) - requests.shared_pages + requests.other_pages
        compacted = self._pages(requests.due_slots) + requests.other_pages
        after = np.where(requests.due_slots > 0, compacted, before)
        in_prompt = self._begins < requests.prompt_steps
        at_peak = np.where(in_prompt, np.maximum(before, after), after)
        pages = np.where(slots < requests.peak_slots, before, at_peak)
        return self._sum(requests, pages, pages, 0.0)

    def _pages(self, slots: _Ints) -> _Ints:
        return -(-slots // self._page_size) * self._groups

    def _sum(self, requests: _Columns, pages: _Ints, limit: _Ints, deviation: _Floats | float) -> _Floats:
        """Mean, variance and upper limit of all pages in each interval: [3, I]; who ends in it counts.

        Args:
            requests: R of them.
            pages: [R, I].
            limit: [R, I] or [R, 1], that no request exceeds.
            deviation: [R, 1], deviation of each request's pages after the next cycle.
        """
        runs = self._begins < requests.steps_remaining  # [R, I]
        alive = np.exp(-self._early_stops * self._begins)  # [I], share that has not stopped early
        mean = np.where(runs, pages, 0).sum(axis=0) * alive
        variance = (runs * np.square(deviation)).sum(axis=0) * (self._begins >= self._longest_cycle)
        if self._early_stops:
            variance = variance + np.where(runs, np.square(pages), 0).sum(axis=0) * alive * (1.0 - alive)
        return np.stack((mean, variance, (runs * limit).sum(axis=0)))


class _Columns(NamedTuple):
    """The fields of R `RequestForecast`s, each int64 [R, 1]."""

    slots_now: _Ints
    peak_slots: _Ints
    cycle_steps: _Ints
    steps_remaining: _Ints
    due_slots: _Ints
    shared_pages: _Ints
    other_pages: _Ints
    prompt_steps: _Ints


_FIELDS = attrgetter(*_Columns._fields)


def _columns(requests: Sequence[RequestForecast]) -> _Columns:
    rows = [_FIELDS(request) for request in requests]
    return _Columns(*np.array(rows, dtype=np.int64).reshape(-1, len(_Columns._fields)).T[:, :, None])
