"""When requests are cut, and to how many tokens, where a pool holds a part of what a steady load wants.

The decisions are those of `decisions/pressure.py`; requests are numbers, and no model runs. Beside the
scheduler's rule, halving, which cuts a request to a half of what it has until it is at its minimum, there is
one switch to the minimum.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.decisions.pressure import NOTICE_MARGIN, Candidate, PoolState, to_switch
from rkv_vllm.settings.values import Switch

PAGE = 16
#: `auto_usage` of a server that does not say.
USAGE = 0.9

#: Gives the tokens that a cut leaves of so many, where the minimum is the second.
Rule = Callable[[int, int], int]
RULES: dict[str, Rule] = {
    "one switch": lambda slots, minimum: minimum,
    "halving": lambda slots, minimum: max(slots // 2, minimum),
}


@dataclass(frozen=True)
class Cut:
    """At a logical length `at`, `keep` tokens stay."""

    at: int
    keep: int


@dataclass(frozen=True)
class Load:
    """Requests that are all alike, and the pool they share.

    Attributes:
        requests: that run, of random ages.
        prompt, length: tokens of a prompt, and of a whole request.
        minimum, buffer: that a request has once it is at its minimum.
        queries: newest tokens whose queries a cut looks at, the notice of an order.
        share: of the pages that the requests would hold with full caches, how many may be filled.
    """

    requests: int
    prompt: int
    length: int
    minimum: int
    buffer: int
    queries: int
    share: float

    @property
    def filled(self) -> int:
        """Pages that requests may fill."""
        ages = range(self.prompt, self.length)
        return int(self.share * self.requests * sum(num_pages(age, PAGE) for age in ages) / len(ages))


@dataclass
class _Request:
    logical: int
    slots: int
    cuts: list[Cut] = field(default_factory=list)
    ordered: Cut | None = None
    at_minimum: bool = False

    def due(self, load: Load) -> Cut | None:
        """Its next cut, where it is known."""
        if self.at_minimum:
            return Cut(self.logical + load.minimum + load.buffer - self.slots, load.minimum)
        return self.ordered

    def cut_if_due(self, load: Load) -> None:
        due = self.due(load)
        if due is not None and self.logical >= due.at:
            self.cuts.append(due)
            self.slots, self.ordered, self.at_minimum = due.keep, None, due.keep == load.minimum


def simulate(load: Load, rule: Rule, lives: int, seed: int) -> list[list[Cut]]:
    """The cuts of each request that begins when the load has run for two of its requests' lives.

    Args:
        lives: for which it runs on, so that as many times `load.requests` begin.
        seed: of the ages.

    Raises: ValueError where the pool overflows: somebody would have been preempted.
    """
    span = load.length - load.prompt
    usable = int(load.filled / USAGE)
    rng = random.Random(seed)
    running = [_begin(rng.randrange(load.prompt, load.length)) for _ in range(load.requests)]
    begun_late: set[int] = set()
    found = []
    for step in range((3 + lives) * span):
        _order(load, rule, running, usable)
        for place, request in enumerate(running):
            request.cut_if_due(load)
            request.logical += 1
            request.slots += 1
            if request.logical >= load.length:
                if id(request) in begun_late:
                    found.append(request.cuts)
                    begun_late.discard(id(request))
                running[place] = _begin(load.prompt)
                if 2 * span <= step < (2 + lives) * span:
                    begun_late.add(id(running[place]))
        if step >= 2 * span and sum(num_pages(each.slots, PAGE) for each in running) > usable:
            raise ValueError(f"share {load.share}: the pool overflows")
    return found


def _begin(logical: int) -> _Request:
    return _Request(logical, logical)


def _order(load: Load, rule: Rule, running: Sequence[_Request], usable: int) -> None:
    """As `scheduling/auto_budgets.py`: who has to be cut is decided from pages and lengths alone."""
    notice = load.queries + NOTICE_MARGIN
    held = sum(num_pages(each.slots, PAGE) for each in running)
    growth = sum(_growth(each, load, notice) for each in running)
    state = PoolState(usable=usable, free=usable - held, growth=growth)
    shortage = state.shortage(USAGE)
    if not shortage:
        return
    candidates = []
    for place, each in enumerate(running):
        slots = each.slots + load.queries  # where it would be cut
        at = each.logical + load.queries
        can = not each.at_minimum and each.ordered is None and slots >= load.minimum + load.buffer
        if can and at + 1 < load.length:
            keep = rule(slots, load.minimum)
            saved = num_pages(each.slots + notice, PAGE) - num_pages(keep + NOTICE_MARGIN, PAGE)
            candidates.append(
                Candidate(
                    request_id=str(place),
                    priority=0,
                    arrival=place,
                    length=slots,
                    saved_pages=saved,
                    tokens_left=load.length - each.logical,
                    switch=Switch(at, keep),
                )
            )
    for candidate in to_switch(candidates, shortage, int(usable * USAGE)):
        request = running[candidate.arrival]
        request.ordered = Cut(*candidate.switch)


def _growth(request: _Request, load: Load, notice: int) -> int:
    """Pages that a request takes within the notice, less what its cut frees."""
    later = min(request.logical + notice, load.length)
    due = request.due(load)
    held = num_pages(request.slots, PAGE)
    if due is None or later <= due.at:
        return num_pages(request.slots + later - request.logical, PAGE) - held
    return num_pages(due.keep + later - due.at, PAGE) - held
