"""Logical and physical length of a request, and when its next compaction is due (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.settings.config import WINDOW, AutoBudget, CompactionSettings, Granularity


@dataclass(slots=True)
class RequestLengths:
    """The counts that decide everything about one compacted request.

    `evicted` is logical minus physical length. It goes back to 0 when the request is preempted, and the
    compactions are then replayed at the same logical lengths.
    """

    num_prompt_tokens: int
    settings: CompactionSettings
    evicted: int = 0

    def physical(self, logical: int) -> int:
        """KV slots in which a request of `logical` tokens has its cache."""
        return logical - self.evicted

    def allocated_slots(self, logical: int) -> int:
        """KV slots that the pool counts as the request's, up to its last token."""
        return self.physical(logical)

    @property
    def due_slots(self) -> int:
        """Physical length at which a compaction is due in decode."""
        return self.settings.threshold

    @property
    def next_due(self) -> int:
        """Logical length at which the next compaction is due."""
        return max(self.num_prompt_tokens, self.evicted + self.due_slots)

    def is_due(self, logical: int) -> bool:
        return logical >= self.next_due

    @property
    def capture_from(self) -> int:
        """Position of the first token whose query the next compaction looks at; at most the last token's."""
        return self.next_due - max(self.settings.num_queries, 1)

    @property
    def unconstrained_until(self) -> int:
        """Logical length up to which a chunk may end without being cut or captured."""
        return self.capture_from

    def end_of_chunk(self, logical: int, num_new_tokens: int) -> int:
        """How many of `num_new_tokens` may be computed before the next compaction has to come.

        A resumed request recomputes its own output in chunks that end where its compactions were, so that
        they see, and evict, what they saw and evicted the first time.
        """
        return min(num_new_tokens, self.next_due - logical)

    @property
    def max_slots(self) -> int:
        """Slots that the request holds at most, in tokens, however long it grows."""
        return max(self.num_prompt_tokens, self.due_slots) + self.eviction_slack

    @property
    def needed_slots(self) -> int:
        """Slots, in tokens, with which it can be computed to its end."""
        return self.max_slots

    def cacheable(self, num_tokens: int) -> int:
        """How many of its first tokens may come from the prefix cache, where it has `num_tokens` by now.

        The tokens whose queries the next compaction looks at are computed, and one or more before them: with
        nothing to compute until it finds a query row, it would stop vLLM's scan of those behind it.
        """
        return self.capture_from - 1

    @property
    def kept_slots(self) -> int:
        """Physical length right after a compaction."""
        return self.settings.budget

    @property
    def eviction_slack(self) -> int:
        """Slots beyond its physical length that the pool may count as the request's."""
        return 0

    def compact(self, logical: int) -> None:
        """Records that a compaction at this length brought the request down to its budget."""
        self.evicted = logical - self.settings.budget

    def confirm_compaction(self, logical: int) -> None:
        """Records that the workers run the compaction at this length: nobody preempted the request first."""

    def confirm_freed(self) -> None:
        """Records that the pages evicted by the last compaction are back in the pool.

        By token they are so at once.
        """

    def restart(self) -> None:
        """Records that all pages are gone and everything is computed again."""
        self.evicted = 0


@dataclass(slots=True)
class PageLengths(RequestLengths):
    """The counts of a request that loses whole pages.

    Which pages left is known only on the device, and reported some steps later. Until then they are
    `leaving`: the request does without them already, and the pool still counts them as its own. The next
    compaction waits for that report, and the request for room: it never holds more than `max_slots`.
    """

    page_size: int = field(kw_only=True)
    leaving: int = field(default=0, init=False)

    @property
    def kept_pages(self) -> int:
        """Pages after a compaction, the last one included: the budget's, or all that may not leave.

        Those are the pages that protected tokens touch, and as many as the window may touch.
        """
        cannot_leave = self._pages(self.settings.protect) + 1 + self._pages(WINDOW - 1)
        return max(self._pages(self.settings.budget), cannot_leave)

    def allocated_slots(self, logical: int) -> int:
        return logical - self.evicted + self.leaving * self.page_size

    @property
    def due_slots(self) -> int:
        # With a small buffer the threshold may come before there is a page to drop, or a round so soon after
        # the last one that it looks at queries that went into a row which was given back.
        return max(self.settings.threshold, self.kept_slots + max(WINDOW, self.settings.num_queries))

    def is_due(self, logical: int) -> bool:
        return not self.leaving and logical >= self.next_due

    @property
    def unconstrained_until(self) -> int:
        return min(self.capture_from, self.max_slots - self.allocated_slots(0))

    def end_of_chunk(self, logical: int, num_new_tokens: int) -> int:
        return min(num_new_tokens, self.next_due - logical, self.max_slots - self.allocated_slots(logical))

    @property
    def kept_slots(self) -> int:
        return self.kept_pages * self.page_size

    @property
    def eviction_slack(self) -> int:
        return self.page_size  # one page more to go on with while others are leaving

    def compact(self, logical: int) -> None:
        """Records that the pages of lowest score are to leave, and `kept_pages` to stay."""
        self.leaving = self._pages(self.physical(logical)) - self.kept_pages
        self.evicted += self.leaving * self.page_size

    def confirm_freed(self) -> None:
        self.leaving = 0

    def restart(self) -> None:
        self.evicted = 0
        self.leaving = 0

    def _pages(self, slots: int) -> int:
        return num_pages(slots, self.page_size)


#: Logical length that no request reaches.
NEVER = 1 << 62


@dataclass(slots=True)
class AutoLengths(RequestLengths):
    """The counts of a request that keeps its full cache until memory is short (budget "auto").

    It then switches once, by its first compaction, and has a fixed budget from there on. When it switches is
    the one thing that does not follow from counts: `order` says so some tokens ahead, which makes the switch
    a compaction like any other, that is due at a known length. Once it was carried out it is final.
    """

    _ordered_at: int | None = field(default=None, init=False)
    _switched_at: int | None = field(default=None, init=False)

    @property
    def auto(self) -> AutoBudget:
        assert self.settings.auto is not None
        return self.settings.auto

    @property
    def switched_at(self) -> int | None:
        """Logical length at which it has switched, since it last started or before a preemption."""
        return self._switched_at

    @property
    def is_undecided(self) -> bool:
        """Whether it may be ordered to switch."""
        return self._switched_at is None and self._ordered_at is None and self.auto.switch_at is None

    @property
    def next_due(self) -> int:
        if self._switched_at is not None:
            switch = self._switched_at
        elif self.auto.switch_at is not None:
            switch = self.auto.switch_at
        elif self._ordered_at is not None:
            switch = self._ordered_at
        else:
            switch = self.auto.max_budget or NEVER
        return max(self.num_prompt_tokens, self.evicted + self.due_slots, switch)

    def earliest_switch(self, logical: int) -> int:
        """Length at which it can switch at the earliest, by an order that it is given at `logical`.

        The queries that the switch looks at are captured from the order on.
        """
        return max(self.num_prompt_tokens, self.due_slots, logical + self.settings.num_queries)

    def switch_on_arrival(self, num_tokens: int) -> int:
        """Where it switches if it is ordered to before any of its `num_tokens` is computed.

        The newest of them was sampled from the full cache of all others.
        """
        return max(self.num_prompt_tokens, self.due_slots, num_tokens - 1)

    def order(self, switch_at: int) -> None:
        """Has the request switch at this logical length, which it has not reached."""
        self._ordered_at = switch_at

    def withdraw_order(self) -> None:
        """Takes back an order that was not carried out."""
        self._ordered_at = None

    @property
    def max_slots(self) -> int:
        return max(self.next_due, self.due_slots)

    @property
    def needed_slots(self) -> int:
        """It can be ordered to switch in time, unless somebody said where it does."""
        return max(self.num_prompt_tokens, self.due_slots, self.auto.switch_at or 0)

    def reserved_slots(self, uncomputed_until: int, notice: int) -> int:
        """Slots that must be kept for it, so that the pool can hold it whatever others do.

        Args:
            uncomputed_until: tokens that it computes before it can switch; 0 where all of them are computed.
            notice: tokens that it may compute from an order to its switch.
        """
        if self.evicted:
            return self.due_slots
        if not self.is_undecided:
            return self.next_due
        return max(uncomputed_until, self.due_slots) + notice

    def cacheable(self, num_tokens: int) -> int:
        due = self.switch_on_arrival(num_tokens) if self._switched_at is None else self.next_due
        return min(due, self.next_due) - max(self.settings.num_queries, 1) - 1

    def confirm_compaction(self, logical: int) -> None:
        if self._switched_at is None:
            self._switched_at = logical

    def restart(self) -> None:
        self.evicted = 0
        self.withdraw_order()


def make_request_lengths(
    granularity: Granularity, num_prompt_tokens: int, settings: CompactionSettings, page_size: int
) -> RequestLengths:
    """The counts of a new request, by what leaves in a compaction, and when the first one comes."""
    if settings.auto is not None:
        return AutoLengths(num_prompt_tokens, settings)
    if granularity == "page":
        return PageLengths(num_prompt_tokens, settings, page_size=page_size)
    return RequestLengths(num_prompt_tokens, settings)
