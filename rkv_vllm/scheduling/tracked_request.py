"""What the scheduler remembers of a request that is compacted, and what its result says."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.request import Request

from rkv_vllm.decisions.auto_lengths import AutoLengths
from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.decisions.messages import KEPT_FULL_CACHE, NEVER_SHORT, TOO_SHORT, Compaction, CompactionResult
from rkv_vllm.observability.metric_table import SwitchCause
from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.settings.config import CompactionSettings
from rkv_vllm.settings.values import AUTO, Switch


@dataclass(slots=True)
class TrackedRequest:
    """A request that is compacted.

    Attributes:
        lengths: its counts, which decide when it is compacted.
        unconstrained_until: that of `lengths`, or lower.
        rounds: compactions since it last started from nothing.
        compactions, evicted_tokens, peak_pages: the highest that each ever was, so that a request which ends
            while preempted still says what happened to it; pages are those of compacted groups.
        eviction_id: names its last `PageCompaction` since then; -1: none.
        hit_pages_of_one, hit_pages_of_several: pages that it found in the prefix cache, held by one other
            request and by several, when vLLM last looked.
        order_cause: why it was ordered to switch since it last started from nothing; None: it was not.
    """

    lengths: RequestLengths
    unconstrained_until: int = 0
    rounds: int = 0
    compactions: int = 0
    evicted_tokens: int = 0
    peak_pages: int = 0
    eviction_id: int = -1
    hit_pages_of_one: int = 0
    hit_pages_of_several: int = 0
    order_cause: SwitchCause | None = None

    @property
    def settings(self) -> CompactionSettings:
        return self.lengths.settings

    @property
    def hit_pages(self) -> int:
        """Pages that it found in the prefix cache, held by others."""
        return self.hit_pages_of_one + self.hit_pages_of_several

    def count(self, compaction: Compaction) -> None:
        """Records that the workers are told to run a round."""
        self.rounds += 1
        self.lengths.confirm_compaction(compaction.logical_length)
        self.compactions = max(self.compactions, self.rounds)
        self.evicted_tokens = max(self.evicted_tokens, compaction.evicted)

    def order_switch(self, switch: Switch, cause: SwitchCause) -> None:
        """Records that the request, whose budget is "auto", has to switch."""
        assert isinstance(self.lengths, AutoLengths)
        self.lengths.order(switch)
        self.order_cause = cause
        self.unconstrained_until = 0

    @property
    def switch_cause(self) -> SwitchCause | None:
        """Why a request with budget "auto" switches where it first does; None: its budget is fixed."""
        if not isinstance(self.lengths, AutoLengths):
            return None
        if self.lengths.auto.switch_at is not None:
            return "switch_at"
        return self.order_cause or "max_budget"

    def most_hit_tokens(self, num_hit_tokens: int, num_tokens: int, num_drafts: int) -> int:
        """How many of the tokens that the prefix cache has found may come from there.

        vLLM pads one that has a single token to compute with `num_drafts` drafts, all of which it rejects,
        and relies on their number. As they must not be cut, they have to end before the next round's first
        query. A prompt of a single token cannot be spared them, and has no query of a round among them.
        """
        most = self.lengths.cacheable(num_tokens)
        if num_hit_tokens + 1 < num_tokens or num_hit_tokens + num_drafts <= most:
            return most
        return max(min(most, num_hit_tokens - 1), 0)

    def resumes_at(self, num_tokens: int) -> int:
        """Where a later request on the same prompt can go on at the latest; 0: nothing keeps it from its end.

        vLLM keeps windows of a prompt's end alone for others, unless it is told where else they are wanted.
        """
        most = self.lengths.cacheable(num_tokens)
        return most if most < num_tokens else 0

    def found_in_cache(self, holders: list[int]) -> None:
        """Records how many requests hold each page of its prefix, when vLLM looks it up."""
        self.hit_pages_of_one = holders.count(1)
        self.hit_pages_of_several = len(holders) - holders.count(0) - holders.count(1)

    def update_peak_pages(self, pages_held: int) -> None:
        """To be called before pages leave: between two compactions a request's pages only grow."""
        self.peak_pages = max(self.peak_pages, pages_held)

    def restart(self) -> None:
        """Records that the request was preempted and computes everything again."""
        self.lengths.restart()
        self.unconstrained_until = 0
        self.rounds = 0
        self.eviction_id = -1
        self.order_cause = None

    def result(self, request: Request, groups: PageGroups) -> CompactionResult:
        """What compaction did to the request."""
        # A step that was scheduled ahead may have taken one page more.
        without = max(groups.pages(_computed(request)), self.peak_pages)
        others = groups.others.peak_pages(request.num_prompt_tokens, request.num_tokens)
        result = CompactionResult(
            budget=self.settings.budget,
            buffer=self.settings.buffer,
            policy=self.settings.policy,
            protect=self.settings.protect or None,
            compactions=self.compactions,
            evicted_tokens=self.evicted_tokens,
            peak_pages=self.peak_pages + others,
            pages_without_compaction=without + others,
            page_size=groups.page_size,
            reason=None if self.compactions else TOO_SHORT,
        )
        if isinstance(self.lengths, AutoLengths):
            result["budget"], result["min_budget"] = AUTO, self.settings.budget
            if not self.compactions:
                result["reason"] = NEVER_SHORT
            elif switches := self.lengths.switches:
                result["full_cache_tokens"] = switches[0].at
                result["switches"] = list(map(str, switches))
        return result


def full_cache_result(request: Request, groups: PageGroups) -> CompactionResult:
    """The result of a request that keeps its full cache."""
    pages = groups.pages(_computed(request))
    pages += groups.others.peak_pages(request.num_prompt_tokens, request.num_tokens)
    return CompactionResult(
        budget=None,
        buffer=None,
        policy=None,
        protect=None,
        compactions=0,
        evicted_tokens=0,
        peak_pages=pages,
        pages_without_compaction=pages,
        page_size=groups.page_size,
        reason=KEPT_FULL_CACHE,
    )


def _computed(request: Request) -> int:
    """Tokens that are in a full cache; the newest one is not yet.

    vLLM's `num_computed_tokens` would not do: it is 0 for a request that ends while preempted.
    """
    return request.num_tokens - 1
