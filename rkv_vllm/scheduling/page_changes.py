"""How a round takes pages from a request: one class a granularity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from typing import Protocol

from rkv_vllm.decisions.messages import Compaction, PageCompaction, TokenCompaction
from rkv_vllm.scheduling.block_manager import PageMove
from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.scheduling.tracked_request import TrackedRequest


class PageChanges(Protocol):
    """How a round takes pages from a request."""

    def num_needed(self, request_id: str, keep: int) -> int:
        """Pages that a round which keeps `keep` tokens takes from the pool at least."""

    def can_begin(self, request_id: str, keep: int) -> bool:
        """Whether such a round finds the pages it needs."""

    def begin(self, counts: Compaction, reserved: int) -> Compaction:
        """Shortens the request's pages, or sees to it that they can be; the message for the workers.

        Takes none of the pages `reserved` in the pool that it can do without: other rounds need them.
        """

    def release(self) -> None:
        """Returns the pages that left in this step's rounds to the pool."""


class MovedTokens:
    """Survivors move to the front, and the emptied pages leave in the same step."""

    def __init__(self, groups: PageGroups) -> None:
        self._groups = groups
        self._moves: list[list[PageMove]] = []

    def num_needed(self, request_id: str, keep: int) -> int:
        return self._groups.num_to_copy(request_id, keep)

    def can_begin(self, request_id: str, keep: int) -> bool:
        return self._groups.can_compact(request_id, keep)

    def begin(self, counts: Compaction, reserved: int) -> Compaction:
        moves = self._groups.compact(counts.request_id, counts.keep, counts.evicted, reserved=reserved)
        self._moves.append(moves)
        return TokenCompaction(
            **asdict(counts),
            source_pages=tuple(move.source_pages for move in moves),
            target_pages=tuple(move.target_pages for move in moves),
        )

    def release(self) -> None:
        moves, self._moves = self._moves, []
        self._groups.release(moves)


class WholePages:
    """Pages leave whole. Only the device knows which: they are counted as the request's until its report."""

    def __init__(self, groups: PageGroups, tracked: Mapping[str, TrackedRequest]) -> None:
        self._groups = groups
        self._tracked = tracked
        self._eviction_ids = count()

    def num_needed(self, request_id: str, keep: int) -> int:
        return 0

    def can_begin(self, request_id: str, keep: int) -> bool:
        return True

    def begin(self, counts: Compaction, reserved: int) -> Compaction:
        self._groups.stop_caching(counts.request_id)
        tracked = self._tracked[counts.request_id]
        tracked.eviction_id = next(self._eviction_ids)
        return PageCompaction(**asdict(counts), eviction_id=tracked.eviction_id)

    def release(self) -> None:
        pass  # until the report
