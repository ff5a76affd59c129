"""Pages that requests with a budget will still take, which admission leaves free (pure arithmetic).

A request with a budget starts small, grows to budget + buffer, and from then on goes up and down between the
two. vLLM admits whatever fits at the moment, so that a full pool would keep preempting: the newest request
gives way to the growth of others, comes back once some page is free, and gives way again. What a request
will hold is known here, so that a new one can wait until there is room for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Of what is known of growth, the part that one request that ended replaces.
_LEARNING_RATE = 1 / 32


@dataclass(frozen=True, slots=True)
class Cycle:
    """A request that was compacted: slots it holds, and those it goes between, in tokens."""

    held: int
    low: int
    high: int


def pages_to_come(cycles: Sequence[Cycle], page_size: int) -> int:
    """Pages that compacted requests will hold at most at the same time, less those they hold.

    Each grows by a token a step and falls back from `high` to `low`. Where they do so at different times, the
    sum hardly moves; where they were started together, all are at their largest together. Never too few, and
    at most a page too many for each request.

    Args:
        cycles: the requests, as they are before a step.
    """
    if not cycles:
        return 0
    held, low, high = np.array([(cycle.held, cycle.low, cycle.high) for cycle in cycles]).T
    period = high - low
    stride = max(page_size // 8, 1)  # steps looked at together, as if each request were at the end of them
    steps = np.arange(0, period.max(), stride)
    slots = np.minimum(low + (held - low + steps[:, None]) % period + stride, high)
    return int((-(-slots // page_size)).sum(axis=1).max() - (-(-held // page_size)).sum())


class Growth:
    """How far requests grow before they end, learnt from those that ended.

    Many workloads end most requests long before a generous budget is full. Room for all of it would then
    stay empty. `share` is a running mean of what part of their possible growth requests had; at first 1.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.share = 1.0

    def to_come(self, held: int, most: int) -> float:
        """Pages that a request which holds `held` slots, of at most `most`, is expected to take."""
        return self.share * max(self._pages(most) - self._pages(held), 0)

    def ended(self, prompt: int, held: int, most: int) -> None:
        """Learns from a request of `prompt` tokens that ended with `held` slots, of at most `most`."""
        possible = self._pages(most) - self._pages(prompt)
        if possible > 0:
            grown = min(max(self._pages(held) - self._pages(prompt), 0) / possible, 1.0)
            self.share += _LEARNING_RATE * (grown - self.share)

    def _pages(self, slots: int) -> int:
        return -(-slots // self._page_size)
