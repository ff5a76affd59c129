"""What requests with a budget will hold of the pool in the steps to come (pure arithmetic).

A request with a budget starts small, grows to budget + buffer, and from then on goes up and down between the
two. vLLM admits whatever fits at the moment, so that a full pool would keep preempting: the newest request
gives way to the growth of others, comes back once some page is free, and gives way again. What a request will
hold is known here, so that a new one can wait until there is room for all.

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

#: The next cycle of the longest buffer is looked at in so many moments, and growth beyond it in a few more.
_NEAR, _FAR = 64, 64
#: An ended request counts for so much less with each that ends after it.
_FORGETTING = 1 / 256


@dataclass(frozen=True, slots=True)
class Course:
    """How many slots, in tokens, a request will hold.

    Attributes:
        held: before this step; of one that has never been compacted, with all of its prompt.
        most: right before its next compaction.
        period: steps from one compaction to the next, and slots that leave in each; 0 before the first.
        left: tokens that it may still generate.
    """

    held: int
    most: int
    period: int
    left: int


class Endings:
    """At which rate requests end before their last allowed token, learnt from those that ended."""

    def __init__(self) -> None:
        self._early = 0.0
        self._tokens = 0.0

    def ended(self, tokens: int, *, early: bool) -> None:
        """Learns from a request that generated so many tokens."""
        keep = 1.0 - _FORGETTING
        self._early = self._early * keep + early
        self._tokens = self._tokens * keep + tokens

    def rate(self, running_tokens: int) -> float:
        """Early endings a token, where the running requests have generated `running_tokens`.

        Rather too few: of n endings two standard deviations less, and so none for the first four.
        """
        return max(self._early - 2.0 * self._early**0.5, 0.0) / max(self._tokens + running_tokens, 1.0)


class Outlook:
    """Pages that some requests will hold together in each of some stretches of time, and a margin for chance.

    Requests that were compacted rise and fall. Where they do so at different times, their sum hardly moves;
    where they were started together, all are at their largest together.
    """

    def __init__(
        self, courses: Sequence[Course], newcomer: Course | None, rate: float, page_size: int
    ) -> None:
        """Looks ahead as far as the youngest request, or the newcomer who may follow, grows.

        Args:
            courses: the requests.
            newcomer: the next to be asked for; not counted.
            rate: early endings a token.
        """
        self._page_size, self._rate = page_size, rate
        cycling = _table([course for course in courses if course.period])
        growing = _table([course for course in courses if not course.period])
        longest = int(cycling.period.max(initial=1))
        stride = max(page_size // 8, longest // _NEAR, 1)
        self._period = longest
        near = np.arange(stride, longest + stride, stride)
        grow = growing.most - growing.held
        if newcomer is not None:
            grow = np.append(grow, newcomer.most - newcomer.held)
        if grow.size:  # Evenly spaced, and where somebody's growth ends: some may have been started together.
            even = np.linspace(longest, grow.max(), _FAR // 2).astype(np.int64)
            far = np.union1d(even, np.quantile(grow, np.linspace(0, 1, _FAR // 2), method="nearest"))
            ends = np.concatenate((near, far[far > near[-1]]))
        else:
            ends = near
        self._ends = ends.astype(np.int32)  # in steps from now
        self._begins = np.concatenate(([0], self._ends[:-1])).astype(np.int32)

        low = cycling.most - cycling.period
        before = low + (cycling.held - low + self._begins[: near.size]) % cycling.period
        in_next_cycle = self._pages(np.minimum(before + stride, cycling.most))
        # Where in its far cycles a request will be is not looked for: it is taken to be where all of them
        # together are at their largest in the next cycle. Of a part of them that may be another moment.
        at_peak = in_next_cycle[:, [in_next_cycle.sum(axis=0).argmax()]]
        pages = np.concatenate((in_next_cycle, np.tile(at_peak, self._ends.size - near.size)), axis=1)
        chance = 2 * cycling.period / page_size / 12**0.5  # two standard deviations of where it is
        self._sums = self._sum(cycling, pages, chance) + self._grown(growing)

    def most_pages(self, newcomer: Course | None = None) -> int:
        """The most of all stretches, with a newcomer if there is one."""
        mean, variance, limit = self._sums if newcomer is None else self._with(newcomer)
        return int(np.ceil(np.minimum(mean + np.sqrt(variance), limit).max()))

    def add(self, newcomer: Course) -> None:
        """Counts one that was never compacted among the requests."""
        self._sums = self._with(newcomer)

    def _with(self, newcomer: Course) -> _Floats:
        return self._sums + self._grown(_table([newcomer]))

    def _grown(self, table: _Table) -> _Floats:
        """Of requests that were never compacted, which stay at their largest once they are there."""
        return self._sum(table, self._pages(np.minimum(table.held + self._ends, table.most)), 0.0)

    def _pages(self, slots: _Ints) -> _Ints:
        return -(-slots // np.int32(self._page_size))

    def _sum(self, table: _Table, pages: _Ints, chance: _Floats | float) -> _Floats:
        """Of all pages in each stretch mean, variance and what they cannot exceed; who ends in it counts.

        Args:
            chance: deviation of each request's pages, in a far cycle.
        """
        runs = self._begins < table.left
        alive = np.exp(-self._rate * self._begins)
        mean = np.where(runs, pages, 0).sum(axis=0) * alive
        variance = (runs * np.square(chance)).sum(axis=0) * (self._begins >= self._period)
        if self._rate:
            variance = variance + np.where(runs, np.square(pages), 0).sum(axis=0) * alive * (1.0 - alive)
        return np.stack((mean, variance, (runs * self._pages(table.most)).sum(axis=0)))


class _Table(NamedTuple):
    """Of some requests, int32 [requests, 1] each."""

    held: _Ints
    most: _Ints
    period: _Ints
    left: _Ints


def _table(courses: Sequence[Course]) -> _Table:
    rows = [(course.held, course.most, course.period, course.left) for course in courses]
    return _Table(*np.array(rows, dtype=np.int32).reshape(-1, 4).T[:, :, None])
