"""What the scheduler tells the workers to do in one step: pure data, pickled with vLLM's SchedulerOutput."""

from __future__ import annotations

from dataclasses import dataclass, field

from rkv_vllm.config import PolicyName

#: Attribute of vLLM's SchedulerOutput that carries the step's CompactionPlan.
PLAN_ATTRIBUTE = "rkv_plan"


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
        query_row: row of the query window that holds the last queries of the request.
    """

    request_id: str
    source_pages: tuple[int, ...]
    target_pages: tuple[int, ...]
    length: int
    keep: int
    evicted: int
    policy: PolicyName
    query_row: int


@dataclass(slots=True)
class CompactionPlan:
    """All of one step: the rounds to run before its forward pass, and whose queries to record during it.

    `recordings` maps a request to its row of the query window; the queries of its last `WINDOW` tokens of the
    step are written there.
    """

    compactions: list[Compaction] = field(default_factory=list)
    recordings: dict[str, int] = field(default_factory=dict)
