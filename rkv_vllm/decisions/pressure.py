"""Which requests with budget "auto" come down towards their budget, and when (pure arithmetic).

A request with budget "auto" keeps its full cache while there is room. Where the pool runs short, some are
ordered to switch to half of what they hold, early enough that nobody has to be preempted: a switch comes as
many tokens after its order as the policy looks at queries, which are captured from the order on. So the pages
that all running requests take meanwhile are looked for ahead of time, which is exact, because it follows from
counts:

    short of pages  =  kept free + wanted by the next in the queue - (free - growth within the notice)

A switch is final, so that nothing can go back and forth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rkv_vllm.settings.values import Switch

#: Steps that growth is looked at beyond a policy's queries: that of the order, and one in which the next
#: order still comes in time.
NOTICE_MARGIN = 2
#: Of the pages that may be filled, how many more than are short become free: the next order is then many
#: steps away.
_RELIEF = 0.05
#: Most time that the switches of one step may take together, for all who wait for it.
_MOST_MILLISECONDS = 10.0
#: Time of a round over n slots, in milliseconds, as measured for an 8B model on an H100.
_PER_SLOT, _PER_PAIR = 2.1e-4, 8.2e-8
#: A request with fewer tokens left gives back its pages soon, and is cut after all others of its priority.
_SOON_DONE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """The pool before a step, in pages.

    Attributes:
        usable: pages that requests can hold.
        free: that nobody holds; contents that the prefix cache may hit do not matter.
        growth: how many more of their own the running requests will hold within the notice, prompts being
            computed included; less those that rounds will free meanwhile.
        wanted: by the next request in the queue, where it is admitted once they are there.
    """

    usable: int
    free: int
    growth: int
    wanted: int = 0

    def shortage(self, usage: float) -> int:
        """Pages that have to become free, so that requests fill no more than this share of the pool."""
        kept_free = self.usable - int(self.usable * usage)
        return max(kept_free + self.wanted - (self.free - self.growth), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A running request that can be ordered to switch.

    Attributes:
        request_id: its name.
        priority: the greater the less urgent; equal for all where priorities are ignored.
        arrival: its place in the list of running requests, in which the newest is last.
        length: slots that its switch looks at.
        saved_pages: of its own that the switch frees, those counted that it would take until then.
        tokens_left: that it may still generate.
        switch: that it would be ordered.
    """

    request_id: str
    priority: int
    arrival: int
    length: int
    saved_pages: int
    tokens_left: int
    switch: Switch


def to_switch(candidates: Iterable[Candidate], shortage: int, filled: int) -> list[Candidate]:
    """Whom to order to switch now, the first first; nobody where no page is short.

    Least urgent requests go first, among them the one that gives most pages back, which is the longest, and
    of equal ones the newest, which vLLM would preempt. No more switch in one step than a fraction of a step's
    time allows: what is still short in the next step is ordered then.

    Args:
        candidates: who can be ordered; those that save nothing are left alone.
        shortage: pages that are short.
        filled: pages that requests may fill.
    """
    if shortage <= 0:
        return []
    needed = shortage + int(filled * _RELIEF)
    chosen: list[Candidate] = []
    milliseconds = 0.0
    for candidate in sorted((each for each in candidates if each.saved_pages > 0), key=_order):
        milliseconds += round_milliseconds(candidate.length)
        if needed <= 0 or (chosen and milliseconds > _MOST_MILLISECONDS):
            break
        chosen.append(candidate)
        needed -= candidate.saved_pages
    return chosen


def round_milliseconds(length: int) -> float:
    """Estimated time of a round over this many slots."""
    return _PER_SLOT * length + _PER_PAIR * length**2


def _order(candidate: Candidate) -> tuple[int, bool, int, int]:
    return (
        -candidate.priority,
        candidate.tokens_left < _SOON_DONE,
        -candidate.saved_pages,
        -candidate.arrival,
    )
