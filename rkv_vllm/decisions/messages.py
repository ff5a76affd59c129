"""Everything of ours that crosses a process, and the field of vLLM's own messages that carries it (pure).

| from | to | message | carried by |
|---|---|---|---|
| scheduler | workers | `CompactionPlan` | attribute of `SchedulerOutput`, a dataclass that is pickled whole |
| workers | scheduler | `PageReport`s, durations | attributes of `ModelRunnerOutput`, likewise |
| scheduler | API server | tally of metrics | keys in `SchedulerStats.num_kv_fetch_reqs_by_stage` |
| scheduler | API server | `CompactionResult` | `RequestOutput.kv_transfer_params`, a free-form field |
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

from rkv_vllm.settings.config import PolicyName

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput

_PLAN = "rkv_plan"
_PAGE_REPORTS = "rkv_page_reports"
_DURATIONS = "rkv_compaction_microseconds"

#: What every key of a tally begins with.
KEY_PREFIX = "rkv_"
#: Key of the `CompactionResult` in `kv_transfer_params`.
RESULT_KEY = "rkv"
#: Key, beside it, of the reason why a request that the whole pool cannot hold was refused.
REFUSAL_KEY = "rkv_refusal"
#: Why nothing of a request was compacted, in its result and in metrics.
KEPT_FULL_CACHE = "full cache"
TOO_SHORT = "shorter than budget + buffer"
NEVER_SHORT = "memory was never short"


# -- scheduler to workers: what to do in a step ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """One request's round: score `length` slots and keep `keep` of them. It follows from counts alone.

    Attributes:
        request_id: vLLM's id of the request.
        length: physical length before, in tokens.
        keep: physical length afterwards, in tokens, the window included.
        evicted: tokens evicted from the request so far, this round included (absolute, so that running a
            compaction's bookkeeping twice does no harm).
        policy: what scores the tokens.
        query_row: row of the query ring that holds its newest queries, or `NO_QUERY_ROW`.
        num_queries: how many of them the policy looks at.
        protect: its first tokens that stay whatever their scores.
        num_previous_survivors: slots, from the first on, that the round before this one has filled; 0 for the
            first round.
    """

    request_id: str
    length: int
    keep: int
    evicted: int
    policy: PolicyName
    query_row: int
    num_queries: int = 0
    protect: int = 0
    num_previous_survivors: int = 0

    @property
    def logical_length(self) -> int:
        """Tokens of the request so far."""
        return self.evicted + self.keep

    @property
    def num_copied_pages(self) -> int:
        """Pages that survivors are copied out of because others hold them too; 0 where nothing moves."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCompaction(Compaction):
    """A round by token: the survivors of each layer and KV head move to the target pages.

    Attributes:
        source_pages: for each KV cache group that is compacted, the request's pages before, in order;
            `ceil(length / page_size)` of them.
        target_pages: likewise its pages afterwards; `ceil(keep / page_size)` of them. Any of them may be a
            source page of the same group too, at the same or another place.
    """

    source_pages: tuple[tuple[int, ...], ...]
    target_pages: tuple[tuple[int, ...], ...]

    @property
    def num_copied_pages(self) -> int:
        return sum(
            source != target
            for sources, targets in zip(self.source_pages, self.target_pages, strict=True)
            for source, target in zip(sources, targets, strict=False)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCompaction(Compaction):
    """A round by page: the pages of lowest score leave the worker's block table, and nothing is moved.

    The worker knows the request's pages, in order, and the scheduler only which they are: from the first
    such round on the worker's block table is the one that counts.

    Attributes:
        eviction_id: names this round in the worker's report of the pages that it evicted; unique.
    """

    eviction_id: int


@dataclass(slots=True)
class CompactionPlan:
    """What all workers do in one step.

    Attributes:
        rounds: to run before the forward pass; all `TokenCompaction`s or all `PageCompaction`s, by the
            server's granularity.
        captures: request -> its row of the query ring, where the queries of its newest tokens of the step,
            as many as a row holds, are written during the forward pass.
    """

    rounds: list[Compaction] = field(default_factory=list)
    captures: dict[str, int] = field(default_factory=dict)


_NOTHING_TO_DO = CompactionPlan()


def attach_plan(scheduler_output: SchedulerOutput, plan: CompactionPlan) -> None:
    """Puts the plan on a step's `SchedulerOutput`."""
    setattr(scheduler_output, _PLAN, plan)


def plan_of(scheduler_output: SchedulerOutput) -> CompactionPlan:
    """The plan of a step; an empty one for the outputs that vLLM makes by itself when it warms up."""
    plan: CompactionPlan = getattr(scheduler_output, _PLAN, _NOTHING_TO_DO)
    return plan


# -- workers to scheduler: what came of it -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PageReport:
    """The outcome of one `PageCompaction`.

    Attributes:
        request_id: vLLM's id of the request.
        eviction_id: names the round.
        pages: ids of the evicted pages, in the order in which the request held them.
    """

    request_id: str
    eviction_id: int
    pages: tuple[int, ...]


def with_reports(output: ModelRunnerOutput, reports: Sequence[PageReport]) -> ModelRunnerOutput:
    """A step's output with the reports on it: a copy, because vLLM shares one empty output."""
    output = copy(output)
    setattr(output, _PAGE_REPORTS, tuple(reports))
    return output


def reports_of(output: ModelRunnerOutput) -> tuple[PageReport, ...]:
    """The reports that came with a step's output; most steps have none."""
    reports: tuple[PageReport, ...] = getattr(output, _PAGE_REPORTS, ())
    return reports


def attach_durations(output: ModelRunnerOutput, microseconds: list[int]) -> None:
    """Puts on a step's output how long the compactions took that were timed since the output before."""
    if microseconds:
        setattr(output, _DURATIONS, microseconds)


def durations_of(output: ModelRunnerOutput) -> list[int]:
    """Microseconds that `attach_durations` put there; most steps have none."""
    durations: list[int] = getattr(output, _DURATIONS, [])
    return durations


# -- scheduler to API server -------------------------------------------------------------------------------


def put_tally(stats: SchedulerStats, tally: dict[str, int]) -> None:
    """Sends a tally along with a step's statistics."""
    stats.num_kv_fetch_reqs_by_stage.update(tally)


def take_tally(stats: SchedulerStats) -> dict[str, int]:
    """The tally sent along, removed, so that what remains is vLLM's own."""
    carrier = stats.num_kv_fetch_reqs_by_stage
    return {key: carrier.pop(key) for key in list(carrier) if key.startswith(KEY_PREFIX)}


class CompactionResult(TypedDict):
    """What compaction did to one finished request: the proof that travels back with its answer.

    `pages_without_compaction` is what the request's logical length would fill; `page_size` is in tokens;
    `reason` says why nothing was compacted, and is None where something was; `sequences` is there where the
    numbers are sums over several.

    With budget "auto", `min_budget` is what it comes down to. Where something was compacted, `switches` are
    the steps, as text, which alone decide the answer, and `full_cache_tokens` is the length at the first of
    them. Where several sequences are summed there are no `switches`.
    """

    budget: int | Literal["auto"] | None
    buffer: int | None
    policy: str | None
    protect: int | None
    compactions: int
    evicted_tokens: int
    peak_pages: int
    pages_without_compaction: int
    page_size: int
    reason: str | None
    sequences: NotRequired[int]
    min_budget: NotRequired[int]
    full_cache_tokens: NotRequired[int]
    switches: NotRequired[list[str]]
