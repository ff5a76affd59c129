"""Logical and physical length of a request, and when its next compaction is due (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.settings.config import WINDOW, CompactionSettings


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

    def most_slots(self, num_tokens: int) -> int:
        """Slots that the request holds at most on its way to so many tokens."""
        return self.max_slots

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
    def survivors(self) -> int:
        """Slots, from the first on, that the last compaction has filled; 0: there was none."""
        return self.kept_slots if self.evicted else 0

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
