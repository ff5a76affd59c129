"""Pages of single requests: what they hold, and what they take within the notice of a switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vllm.v1.request import Request

from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.scheduling.tracked_request import TrackedRequest


class PageCounts:
    """Attributes:
    notice: tokens that are looked ahead.
    """

    def __init__(
        self,
        groups: PageGroups,
        tracked: Mapping[str, TrackedRequest],
        final_length: Callable[[Request], int],
    ) -> None:
        """
        Args:
            groups: hold the requests' pages.
            tracked: the requests with a budget by id, kept up to date by the scheduler.
            final_length: tokens that a request has when it ends at the latest.
        """
        self._groups = groups
        self._pages = groups.pages
        self._tracked = tracked
        self._final_length = final_length
        self.notice = 0

    def missing(self, request: Request, num_tokens: int) -> int:
        """Pages that a request which waits has to be given for so many tokens."""
        tracked = self._tracked.get(request.request_id)
        others = self._groups.others.most_pages(num_tokens)
        if tracked is None:
            return self._pages(num_tokens) + others
        return (
            self._pages(min(num_tokens, tracked.lengths.most_slots(num_tokens))) - tracked.hit_pages + others
        )

    def growth(self, request: Request) -> int:
        """Pages that a running request takes within the notice, before any round."""
        held = self._groups.num_pages(request.request_id)
        tracked = self._tracked.get(request.request_id)
        later = self.later(request)
        slots = later if tracked is None else tracked.lengths.physical(min(later, tracked.lengths.next_due))
        others = self._groups.others.growth(request.num_computed_tokens, later)
        return max(self._pages(slots) - held, 0) + others

    def net_growth(self, request: Request) -> int:
        """The same, less the pages that a round frees meanwhile."""
        growth, tracked = self.growth(request), self._tracked.get(request.request_id)
        if tracked is None or request.num_computed_tokens + 1 < request.num_tokens:
            return growth  # when a prompt will have been computed is not known
        lengths, later = tracked.lengths, self.later(request)
        if later <= lengths.next_due:
            return growth
        after = self._pages(lengths.kept_slots + later - lengths.next_due)
        others = self._groups.others.growth(request.num_computed_tokens, later)
        return after - self.own(request.request_id) + others

    def later(self, request: Request) -> int:
        """Tokens that a request has at the end of the notice."""
        later = max(request.num_tokens, request.num_computed_tokens) + self.notice
        return min(later, self._final_length(request))

    def own(self, request_id: str) -> int:
        """Pages that no other request holds."""
        held = self._groups.num_pages(request_id)
        return held if self._tracked[request_id].rounds else held - self._groups.num_shared_pages(request_id)
