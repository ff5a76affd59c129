"""Which requests are compacted in a step, and where chunks end so that rounds come when they are due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from rkv_vllm.decisions.messages import Compaction, PageReport
from rkv_vllm.decisions.query_rows import NO_QUERY_ROW, QueryRows
from rkv_vllm.observability.tally import MetricTally
from rkv_vllm.scheduling.auto_budgets import Order
from rkv_vllm.scheduling.page_changes import MovedTokens, PageChanges, WholePages
from rkv_vllm.scheduling.page_groups import PageGroups
from rkv_vllm.scheduling.tracked_request import TrackedRequest
from rkv_vllm.settings.config import Granularity


class RoundPlanner:
    """Plans rounds from counts alone: never from a request's neighbours or from sampled tokens.

    Owns the query rows and the list of requests that may be due. Changes a request's lengths, and its pages.
    """

    def __init__(
        self,
        *,
        granularity: Granularity,
        requests: Mapping[str, Request],
        tracked: Mapping[str, TrackedRequest],
        groups: PageGroups,
        query_rows: QueryRows,
        tally: MetricTally,
        preempt_one: Callable[[], Request],
        final_length: Callable[[Request], int],
        has_drafts: bool,
    ) -> None:
        """
        Args:
            granularity: what leaves a request in a round.
            requests: the scheduler's requests by id, kept up to date by vLLM.
            tracked: those of them with a budget, kept up to date by the scheduler.
            groups: hold their pages.
            query_rows: the rows of the query ring.
            tally: told what was planned, deferred and cancelled.
            preempt_one: preempts the request that vLLM would preempt next, and returns it.
            final_length: tokens that a request has when it ends at the latest.
            has_drafts: whether steps verify drafts, some of which they reject.
        """
        self._requests = requests
        self._tracked = tracked
        self._groups = groups
        self._query_rows = query_rows
        self._tally = tally
        self._preempt_one = preempt_one
        self._final_length = final_length
        self._has_drafts = has_drafts
        self._page_changes: PageChanges = (
            WholePages(groups, tracked) if granularity == "page" else MovedTokens(groups)
        )
        self._may_be_due: list[Request] = []  # every request that is due, and some that are not

    # -- a step --------------------------------------------------------------------------------------------

    def plan_rounds(self) -> list[Compaction]:
        """Shortens every running request that is due, before vLLM decides anything about the step.

        Pages that left are still to be released.
        """
        due = {
            request: tracked
            for request in self._may_be_due
            if (tracked := self._tracked.get(request.request_id)) and self._is_due(request, tracked)
        }
        self._may_be_due = [
            request
            for request in self._may_be_due
            if request.request_id in self._tracked and self._may_be_rolled_back(request)
        ]
        needed = {
            request: self._page_changes.num_needed(request.request_id, tracked.lengths.kept_slots)
            for request, tracked in due.items()
        }
        reserved, rounds = sum(needed.values()), []
        for request, tracked in due.items():
            reserved -= needed[request]  # what is left is for the rounds to come
            if self._is_due(request, tracked) and self._preempt_until_compactable(request, tracked):
                rounds.append(self._begin_round(request, tracked, reserved))
        return rounds

    def release_pages(self) -> None:
        """Returns the pages that left to the pool, once all rounds of the step have theirs."""
        self._page_changes.release()

    def drop_preempted(self, rounds: list[Compaction], preempted: set[str]) -> list[Compaction]:
        """The rounds of requests that vLLM has not preempted after they were planned.

        The pages of the others may have a new owner in this very step.
        """
        for planned in rounds:
            if planned.request_id in preempted:
                self._tally.cancelled(planned)
        return [planned for planned in rounds if planned.request_id not in preempted]

    def commit(self, rounds: list[Compaction]) -> None:
        """Records that the workers are told to run these rounds."""
        for planned in rounds:
            tracked = self._tracked[planned.request_id]
            if not tracked.compactions and tracked.switch_cause is not None:
                self._tally.switched(tracked.switch_cause)
            tracked.count(planned)
            self._tally.executed(planned)

    def captures(self, output: SchedulerOutput) -> dict[str, int]:
        """Whose queries to capture in this step, and in which row: the scheduled requests that hold one."""
        captures = {}
        for request_id, row in self._query_rows.held():
            if request_id in output.num_scheduled_tokens:
                captures[request_id] = row
            elif self._requests[request_id].status != RequestStatus.RUNNING:
                # Tried, and not admitted for want of pages: those that run must not wait for its row.
                self._query_rows.release(request_id)
        return captures

    def apply_page_report(self, report: PageReport) -> None:
        """Returns reported pages to the pool; every step that read them has run."""
        tracked = self._tracked.get(report.request_id)
        if tracked is None or tracked.eviction_id != report.eviction_id:
            return  # finished, or started again: it has nothing of what is reported
        tracked.update_peak_pages(self._groups.num_pages(report.request_id))
        self._groups.remove_pages(report.request_id, report.pages)
        tracked.lengths.confirm_freed()
        self._may_be_due.append(self._requests[report.request_id])

    # -- a request -----------------------------------------------------------------------------------------

    def forget(self, request_id: str) -> None:
        """Takes the query row, or the place in line, of a request that was preempted or has ended."""
        self._query_rows.release(request_id)

    def end_of_chunk(
        self, request: Request, tracked: TrackedRequest, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """How many of `num_new_tokens` the request may compute in this step.

        A chunk ends where the next round is due, and before its queries while no query row is free. Up to
        `tracked.unconstrained_until` nothing bounds it, and this need not be asked.
        """
        lengths = tracked.lengths
        tracked.unconstrained_until = lengths.unconstrained_until
        num_new_tokens = lengths.end_of_chunk(num_computed_tokens, num_new_tokens)
        first = lengths.capture_from
        if (
            tracked.settings.num_queries
            and num_computed_tokens + num_new_tokens > first
            # One that may not be admitted takes what nobody waits for.
            and not self._query_rows.hold(
                request.request_id, gets_in_line=request.status == RequestStatus.RUNNING
            )
        ):
            # Without a row it stays before the first of them, and waits there for one.
            self._tally.deferred("no_query_row")
            num_new_tokens = max(first - num_computed_tokens, 0)
        if num_computed_tokens + num_new_tokens >= lengths.next_due:
            self._may_be_due.append(request)
        return num_new_tokens

    def order_switches(self, orders: Iterable[Order]) -> None:
        """Has requests with budget "auto" switch, as long as there are query rows.

        A row is held from the order on, so that nobody waits for one on the way to a switch.
        """
        for request, switch, cause in orders:
            tracked = self._tracked[request.request_id]
            if tracked.settings.num_queries and not self._query_rows.hold(
                request.request_id, gets_in_line=False
            ):
                return
            tracked.order_switch(switch, cause)
            self._groups.set_max_slots(request.request_id, tracked.lengths.most_slots(request.num_tokens))
            if request.num_computed_tokens >= switch.at:
                self._may_be_due.append(request)

    def _is_due(self, request: Request, tracked: TrackedRequest) -> bool:
        # Logical; the steps that compute these tokens are all enqueued, whether their output is known or not.
        if request.status != RequestStatus.RUNNING or not tracked.lengths.is_due(request.num_computed_tokens):
            return False
        if self._may_be_rolled_back(request):
            return False
        # Where the last token is among those not known yet, nothing will read the cache again.
        return request.num_tokens + request.num_output_placeholders < self._final_length(request)

    def _may_be_rolled_back(self, request: Request) -> bool:
        """Whether tokens that count as computed may be drafts that a step in flight rejects.

        No draft is among tokens whose successors are known. Beyond those, all that is in flight counts as
        drafts: next to nothing else is.
        """
        if not self._has_drafts or request.num_computed_tokens <= request.num_tokens:
            return False
        # Output of a life that a preemption has ended rolls nothing back.
        return request.num_in_flight_tokens > request.num_stale_output_tokens

    def _preempt_until_compactable(self, request: Request, tracked: TrackedRequest) -> bool:
        """Preempts, as vLLM does where slots run out, until there are pages to compact into.

        Waiting for pages instead would move this round, and all later ones, to other tokens. It ends: a
        request that runs alone shares no page. Returns False where the request itself had to go.
        """
        while not self._page_changes.can_begin(request.request_id, tracked.lengths.kept_slots):
            self._tally.preempted_for_room()
            if self._preempt_one() is request:
                self._tally.deferred("no_pages")
                return False
        return True

    def _begin_round(self, request: Request, tracked: TrackedRequest, reserved: int) -> Compaction:
        request_id, logical, lengths = request.request_id, request.num_computed_tokens, tracked.lengths
        tracked.update_peak_pages(self._groups.num_pages(request_id))
        length, survivors = lengths.physical(logical), lengths.survivors
        num_queries = tracked.settings.num_queries
        query_row = self._query_rows.row_of(request_id) if num_queries else NO_QUERY_ROW
        self._query_rows.release(request_id)
        lengths.compact(logical)
        # The row was given back: the next round's queries must all lie behind this length.
        assert lengths.capture_from >= logical, f"{request_id}: two rounds look at the same queries"
        counts = Compaction(
            request_id=request_id,
            length=length,
            keep=lengths.physical(logical),
            evicted=lengths.evicted,
            policy=tracked.settings.policy,
            query_row=query_row,
            num_queries=num_queries,
            protect=tracked.settings.protect,
            num_previous_survivors=survivors,
        )
        return self._page_changes.begin(counts, reserved)
