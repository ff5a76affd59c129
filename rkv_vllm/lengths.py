"""Logical and physical length of a request, and when its next compaction is due (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from rkv_vllm.config import WINDOW, RequestBudget


@dataclass(slots=True)
class RequestLengths:
    """The counts that decide everything about one compacted request.

    `evicted` is logical minus physical length. It goes back to 0 when the request is preempted, and the
    compactions are then replayed at the same logical lengths.
    """

    num_prompt_tokens: int
    budget: RequestBudget
    evicted: int = 0

    def physical(self, logical: int) -> int:
        """KV slots held by a request of `logical` tokens."""
        return logical - self.evicted

    @property
    def next_due(self) -> int:
        """Logical length at which the next compaction is due: in decode, at budget + buffer slots."""
        return max(self.num_prompt_tokens, self.evicted + self.budget.threshold)

    def is_due(self, logical: int) -> bool:
        return logical >= self.next_due

    @property
    def recorded_from(self) -> int:
        """Position of the first token whose query the next compaction looks at."""
        return max(self.next_due - WINDOW, 0)

    def end_of_chunk(self, logical: int, num_new_tokens: int) -> int:
        """How many of `num_new_tokens` may be computed before the next compaction has to come.

        A resumed request recomputes its own output in chunks that end where its compactions were, so that
        they see, and evict, what they saw and evicted the first time.
        """
        return min(num_new_tokens, self.next_due - logical)

    @property
    def most_slots(self) -> int:
        """Slots that the request holds at most, in tokens, however long it grows."""
        return max(self.num_prompt_tokens, self.budget.threshold)

    def compact(self, logical: int) -> None:
        """Records that a compaction at this length brought the request down to its budget."""
        self.evicted = logical - self.budget.budget

    def restart(self) -> None:
        """Records that all pages are gone and everything is computed again."""
        self.evicted = 0
