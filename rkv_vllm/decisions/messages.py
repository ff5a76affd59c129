"""What the scheduler tells the workers to do in one step: pure data, pickled with vLLM's SchedulerOutput."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rkv_vllm.settings.config import PolicyName

#: Attribute of vLLM's SchedulerOutput that carries the step's CompactionPlan.
_ATTRIBUTE = "rkv_plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One request's round: score `length` slots and keep `keep` of them. Worked out from counts alone.

    Attributes:
        request_id: vLLM's id of the request.
        length: physical length before, in tokens.
        keep: physical length afterwards, in tokens, the window included.
        evicted: tokens evicted from the request so far, this round included (absolute, so that running a
            compaction's bookkeeping twice does no harm).
        policy: what scores the tokens.
        query_row: row of the query window that holds its last queries; -1: the policy needs none.
    """

    request_id: str
    length: int
    keep: int
    evicted: int
    policy: PolicyName
    query_row: int

    @property
    def logical_length(self) -> int:
        """Tokens of the request so far."""
        return self.evicted + self.keep

    @property
    def survivors(self) -> int:
        """Slots, from the first on, that the round before this one has filled; 0 for the first round."""
        return self.keep if self.evicted > self.length - self.keep else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction(Round):
    """A round by token: the survivors of each layer and KV head move to the target pages.

    Attributes:
        source_pages: the request's pages before, in order; `ceil(length / page_size)` of them.
        target_pages: its pages afterwards, in order; `ceil(keep / page_size)` of them. Any of them may be a
            source page too, at the same or another place.
    """

    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageEviction(Round):
    """A round by page: the pages of lowest score leave the worker's block table, and nothing is moved.

    The worker knows the request's pages, in order, and the scheduler only which they are: from the first
    such round on the worker's block table is the one that counts.

    Attributes:
        sequence: names this round in the worker's report of which pages left; no two rounds share it.
    """

    sequence: int


@dataclass(slots=True)
class CompactionPlan:
    """All of one step: the rounds to run before its forward pass, and whose queries to record during it.

    `compactions` or `page_evictions` are the rounds, by the server's granularity.

    `recordings` maps a request to its row of the query window; the queries of its last `WINDOW` tokens of the
    step are written there.
    """

    compactions: list[Compaction] = field(default_factory=list)
    recordings: dict[str, int] = field(default_factory=dict)
    page_evictions: list[PageEviction] = field(default_factory=list)


_NOTHING_TO_DO = CompactionPlan()


def attach_plan(scheduler_output: Any, plan: CompactionPlan) -> None:
    """Puts the plan on vLLM's SchedulerOutput: a plain dataclass, pickled whole to every worker."""
    setattr(scheduler_output, _ATTRIBUTE, plan)


def plan_of(scheduler_output: Any) -> CompactionPlan:
    """The plan of a step; an empty one for the outputs that vLLM makes by itself when it warms up."""
    return getattr(scheduler_output, _ATTRIBUTE, _NOTHING_TO_DO)
