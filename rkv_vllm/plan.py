"""What the scheduler tells the workers to do in one step: pure data, pickled with vLLM's SchedulerOutput."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rkv_vllm.config import PolicyName

#: Attribute of vLLM's SchedulerOutput that carries the step's CompactionPlan.
_ATTRIBUTE = "rkv_plan"


@dataclass(frozen=True, slots=True)
class Compaction:
    """One request's round: score `length` slots, keep `keep` of them, move those to the target pages.

    Worked out from counts alone, so that every worker can run it without looking at another.

    Attributes:
        request_id: vLLM's id of the request.
        source_pages: the request's pages before, in order; `ceil(length / page_size)` of them.
        target_pages: its pages afterwards, in order; `ceil(keep / page_size)` of them. Any of them may be a
            source page too, at the same or another place.
        length: physical length before, in tokens.
        keep: physical length afterwards, in tokens, the window included.
        evicted: tokens evicted from the request so far, this round included (absolute, so that running a
            compaction's bookkeeping twice does no harm).
        policy: what scores the tokens.
        query_row: row of the query window that holds its last queries; -1: the policy needs none.
    """

    request_id: str
    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]
    length: int
    keep: int
    evicted: int
    policy: PolicyName
    query_row: int

    @property
    def logical_length(self) -> int:
        """Tokens of the request so far."""
        return self.evicted + self.keep


@dataclass(slots=True)
class CompactionPlan:
    """All of one step: the rounds to run before its forward pass, and whose queries to record during it.

    `recordings` maps a request to its row of the query window; the queries of its last `WINDOW` tokens of the
    step are written there.
    """

    compactions: list[Compaction] = field(default_factory=list)
    recordings: dict[str, int] = field(default_factory=dict)


_NOTHING_TO_DO = CompactionPlan()


def attach_plan(scheduler_output: Any, plan: CompactionPlan) -> None:
    """Puts the plan on vLLM's SchedulerOutput: a plain dataclass, pickled whole to every worker."""
    setattr(scheduler_output, _ATTRIBUTE, plan)


def plan_of(scheduler_output: Any) -> CompactionPlan:
    """The plan of a step; an empty one for the outputs that vLLM makes by itself when it warms up."""
    return getattr(scheduler_output, _ATTRIBUTE, _NOTHING_TO_DO)
