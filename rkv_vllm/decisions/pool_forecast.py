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
is known here, so that a new one can wait until there is room for all.

A request ends at the latest with its last allowed token. Those that end before are taken to do so at a
constant rate, which is learnt: many workloads end most requests long before a generous budget is full, and
room kept for all of it would stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

_Ints: TypeAlias = npt.NDArray[np.int32]
_Floats: TypeAlias = npt.NDArray[np.float64]

#: Intervals within the next compaction cycle, and after it.
_INTERVALS_IN_NEXT_CYCLE, _INTERVALS_AFTER = 64, 64
#: Exponential decay of what was learnt, per finished request.
_DECAY_PER_REQUEST = 1 / 256


@dataclass(frozen=True, slots=True)
class RequestForecast:
    """KV slots, in tokens, that one request will hold.

    Attributes:
        slots_now: before this step; for a request that was never compacted, with all of its prompt.
        peak_slots: right before its next compaction.
        cycle_steps: steps from one compaction to the next, and slots evicted in each; 0 before the first.
        tokens_remaining: tokens that it may still generate.
    """

    slots_now: int
    peak_slots: int
    cycle_steps: int
    tokens_remaining: int


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
    """Upper estimate of the pages that the running requests hold together in each future interval.

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
    ) -> None:
        """Looks ahead as far as the youngest request, or the newcomer who may follow, grows.

        Args:
            requests: those that run.
            newcomer: the next to be asked for; not counted.
            early_stops: rate of early stops per token.
            page_size: tokens in a page.
        """
        self._page_size, self._early_stops = page_size, early_stops
        cycling = _columns([request for request in requests if request.cycle_steps])
        growing = _columns([request for request in requests if not request.cycle_steps])
        self._longest_cycle = int(cycling.cycle_steps.max(initial=1))
        stride = max(page_size // 8, self._longest_cycle // _INTERVALS_IN_NEXT_CYCLE, 1)
        growth = (growing.peak_slots - growing.slots_now).ravel()  # [R growing], in steps as well as slots
        if newcomer is not None:
            growth = np.append(growth, newcomer.peak_slots - newcomer.slots_now)
        next_cycle = np.arange(stride, self._longest_cycle + stride, stride)  # [I1]
        after = self._ends_after(int(next_cycle[-1]), growth)
        self._ends = np.concatenate((next_cycle, after)).astype(np.int32)  # [I], last step of each
        self._begins = np.concatenate(([0], self._ends[:-1])).astype(np.int32)  # [I], in steps from now

        low = cycling.peak_slots - cycling.cycle_steps  # [R, 1], right after a compaction
        phase = (cycling.slots_now - low + self._begins[: next_cycle.size]) % cycling.cycle_steps  # [R, I1]
        in_next_cycle = self._pages(np.minimum(low + phase + stride, cycling.peak_slots))
        # Where in its later cycles a request will be is not looked for: it is taken to be where all of them
        # together are at their largest in the next cycle. A part of them may peak at another moment.
        at_peak = in_next_cycle[:, [in_next_cycle.sum(axis=0).argmax()]]  # [R, 1]
        pages = np.concatenate(
            (in_next_cycle, np.tile(at_peak, self._ends.size - next_cycle.size)), axis=1
        )  # [R, I]
        # Two standard deviations of a request's place in its cycle, in pages.
        deviation = 2 * cycling.cycle_steps / page_size / 12**0.5  # [R, 1]
        self._sums = self._sum(cycling, pages, deviation) + self._grown(growing)  # [3, I]

    def peak_pages(self, newcomer: RequestForecast | None = None) -> int:
        """The largest estimate of all intervals, with a newcomer if there is one."""
        mean, variance, limit = self._sums if newcomer is None else self._with(newcomer)
        return int(np.ceil(np.minimum(mean + np.sqrt(variance), limit).max()))

    def add(self, newcomer: RequestForecast) -> None:
        """Counts a request that was never compacted among those that run."""
        self._sums = self._with(newcomer)

    def _ends_after(self, next_cycle_end: int, growth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Last steps of the intervals after the next cycle: [I - I1].

        Evenly spaced, and where some request stops growing: several may have been started together.
        """
        if not growth.size:
            return np.empty(0, dtype=np.int64)
        even = np.linspace(self._longest_cycle, growth.max(), _INTERVALS_AFTER // 2).astype(np.int64)
        quantiles = np.linspace(0, 1, _INTERVALS_AFTER // 2)
        ends = np.union1d(even, np.quantile(growth, quantiles, method="nearest"))
        return ends[ends > next_cycle_end]

    def _with(self, newcomer: RequestForecast) -> _Floats:
        return self._sums + self._grown(_columns([newcomer]))

    def _grown(self, requests: _Columns) -> _Floats:
        """[3, I] for requests that were never compacted: they stay at their peak once they are there."""
        slots = np.minimum(requests.slots_now + self._ends, requests.peak_slots)  # [R, I]
        return self._sum(requests, self._pages(slots), 0.0)

    def _pages(self, slots: _Ints) -> _Ints:
        return -(-slots // np.int32(self._page_size))

    def _sum(self, requests: _Columns, pages: _Ints, deviation: _Floats | float) -> _Floats:
        """Mean, variance and upper limit of all pages in each interval: [3, I]; who ends in it counts.

        Args:
            requests: R of them.
            pages: [R, I].
            deviation: [R, 1], deviation of each request's pages after the next cycle.
        """
        runs = self._begins < requests.tokens_remaining  # [R, I]
        alive = np.exp(-self._early_stops * self._begins)  # [I], share that has not stopped early
        mean = np.where(runs, pages, 0).sum(axis=0) * alive
        variance = (runs * np.square(deviation)).sum(axis=0) * (self._begins >= self._longest_cycle)
        if self._early_stops:
            variance = variance + np.where(runs, np.square(pages), 0).sum(axis=0) * alive * (1.0 - alive)
        return np.stack((mean, variance, (runs * self._pages(requests.peak_slots)).sum(axis=0)))


class _Columns(NamedTuple):
    """The fields of R `RequestForecast`s, each int32 [R, 1]."""

    slots_now: _Ints
    peak_slots: _Ints
    cycle_steps: _Ints
    tokens_remaining: _Ints


def _columns(requests: Sequence[RequestForecast]) -> _Columns:
    rows = [(r.slots_now, r.peak_slots, r.cycle_steps, r.tokens_remaining) for r in requests]
    return _Columns(*np.array(rows, dtype=np.int32).reshape(-1, 4).T[:, :, None])
