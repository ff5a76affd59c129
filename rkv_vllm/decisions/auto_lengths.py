"""The counts of a request with budget "auto" (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rkv_vllm.decisions.lengths import PageLengths, RequestLengths
from rkv_vllm.settings.config import AutoBudget, CompactionSettings, Granularity
from rkv_vllm.settings.values import Switch

#: Logical length that no request reaches.
NEVER = 1 << 62


@dataclass(slots=True)
class AutoLengths(RequestLengths):
    """The counts of a request that keeps its full cache until memory is short (budget "auto").

    It then comes down in steps. A switch is a compaction that leaves as many tokens as it says, in most cases
    half of what the request holds, and no fewer than its budget. Once it holds its budget it has a fixed one,
    and until then it grows again after each switch. Where it switches, and to what, is the one thing that
    does not follow from counts: `order` says so some tokens ahead, which makes a switch a compaction like any
    other, that is due at a known length. Those that were carried out are final.
    """

    _order: Switch | None = field(default=None, init=False)
    #: Those that it carried out, in a life that a preemption has ended too.
    _switches: list[Switch] = field(default_factory=list, init=False)
    #: How many of them since it last started, and the slots that the last of these left.
    _done: int = field(default=0, init=False)
    _kept: int | None = field(default=None, init=False)

    @property
    def auto(self) -> AutoBudget:
        assert self.settings.auto is not None
        return self.settings.auto

    @property
    def switches(self) -> Sequence[Switch]:
        """Those that it has carried out, since it last started or before a preemption."""
        return self._switches

    @property
    def is_at_budget(self) -> bool:
        """Whether it has come down all the way."""
        return self._kept == self.settings.budget

    @property
    def is_undecided(self) -> bool:
        """Whether it may be ordered to switch, once those switches are done that are known already."""
        if self._order is not None or self.auto.switch_at is not None or self.is_at_budget:
            return False
        return all(kept > self.settings.budget for _, _, kept in self._to_come(NEVER))

    @property
    def next_due(self) -> int:
        earliest = self._earliest(self.evicted)
        if self.is_at_budget:
            return earliest
        switch = self._next_switch
        return NEVER if switch is None else max(earliest, switch.at, self._after_last_queries)

    def _earliest(self, evicted: int) -> int:
        """The first length at which anything may be due, where so many tokens were evicted."""
        return max(self.num_prompt_tokens, evicted + self.due_slots)

    @property
    def _next_switch(self) -> Switch | None:
        if self._done < len(self._known):
            return self._known[self._done]
        if self.auto.switch_at is not None:
            return None  # that was all
        if self._order is None and self.auto.max_budget is not None:
            at = max(self._earliest(self.evicted), self.evicted + self.auto.max_budget)
            at = max(at, self._after_last_queries)
            return Switch(at, self.half_of(at - self.evicted))
        return self._order

    @property
    def _known(self) -> Sequence[Switch]:
        """The switches that it was told, or has carried out."""
        return self._switches if self.auto.switch_at is None else self.auto.switch_at

    @property
    def _after_last_queries(self) -> int:
        """A switch looks at queries that came after the last one; the row for them was given back."""
        return 0 if self._kept is None else self.evicted + self._kept + max(self.settings.num_queries, 1)

    def half_of(self, slots: int) -> int:
        """What a step of one half leaves of so many slots."""
        return max(slots // 2, self.settings.budget)

    @property
    def kept_slots(self) -> int:
        switch = None if self.is_at_budget else self._next_switch
        return self.settings.budget if switch is None else self._left_by(switch, self.physical(self.next_due))

    def _left_by(self, switch: Switch, slots: int) -> int:
        """What a switch leaves of so many slots, whoever has told it."""
        return max(min(switch.kept, slots - 1), self.settings.budget)

    @property
    def survivors(self) -> int:
        return self._kept or 0

    def earliest_switch(self, logical: int) -> int:
        """Length at which it can switch at the earliest, by an order that it is given at `logical`.

        The queries that the switch looks at are captured from the order on.
        """
        return max(self._earliest(self.evicted), logical + self.settings.num_queries)

    def switch_on_arrival(self, num_tokens: int) -> int:
        """Where it switches if it is ordered to before any of its `num_tokens` is computed.

        The newest of them was sampled from what it held then.
        """
        return max(self._earliest(self._evicted_after_known), num_tokens - 1)

    def slots_on_arrival(self, num_tokens: int) -> int:
        """What it holds there."""
        return self.switch_on_arrival(num_tokens) - self._evicted_after_known

    @property
    def _evicted_after_known(self) -> int:
        evicted = self.evicted
        for at, _, kept in self._to_come(NEVER):
            evicted = at - kept
        return evicted

    def order(self, switch: Switch) -> None:
        """Has the request switch at a logical length that it has not reached."""
        self._order = switch

    def withdraw_order(self) -> None:
        """Takes back an order that was not carried out."""
        self._order = None

    def compact(self, logical: int) -> None:
        if self.is_at_budget:
            self.evicted = logical - self.settings.budget
            return
        switch = self._next_switch
        assert switch is not None
        self._kept = self._left_by(switch, self.physical(logical))
        self.evicted = logical - self._kept
        if self._done >= len(self._known):
            self.withdraw_order()  # this was it
        self._done += 1

    def confirm_compaction(self, logical: int) -> None:
        if self._done > len(self._switches):
            assert self._kept is not None
            self._switches.append(Switch(logical, self._kept))

    def restart(self) -> None:
        self.evicted, self._done, self._kept = 0, 0, None
        self.withdraw_order()

    # -- room ----------------------------------------------------------------------------------------------

    def _to_come(self, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Switches that are known or ordered, up to that length: where, slots before and afterwards."""
        evicted, kept = self.evicted, self._kept
        ordered = () if self._order is None else (self._order,)
        for switch in (*self._known[self._done :], *ordered):
            at = max(switch.at, self._earliest(evicted))
            if kept == self.settings.budget or at > num_tokens:
                return
            slots = at - evicted
            kept = self._left_by(switch, slots)
            evicted = at - kept
            yield at, slots, kept

    def most_slots(self, num_tokens: int) -> int:
        most, evicted, kept = 0, self.evicted, self._kept
        for at, slots, kept in self._to_come(num_tokens):
            most, evicted = max(most, slots), at - kept
        if kept == self.settings.budget:
            return max(most, self.due_slots)
        return max(most, num_tokens - evicted)

    @property
    def needed_slots(self) -> int:
        """It can be ordered to switch in time, unless somebody said where it does."""
        needed = max(self.num_prompt_tokens, self.due_slots)
        return needed if self.auto.switch_at is None else max(needed, self.most_slots(NEVER))

    def reserved_slots(self, uncomputed_until: int, notice: int) -> int:
        """Slots that must be kept for it, so that the pool can hold it whatever others do.

        Args:
            uncomputed_until: tokens that it computes before it can be ordered to switch; 0 where all of them
                are computed.
            notice: tokens that it may compute from an order to its switch.
        """
        if self.is_at_budget:
            return self.due_slots
        until_then = self.most_slots(uncomputed_until) if uncomputed_until else 0
        reserved = max(until_then, self.due_slots)
        return reserved + notice if self.is_undecided else max(reserved, self.next_due - self.evicted)

    def cacheable(self, num_tokens: int) -> int:
        due = self.next_due
        if self._done >= len(self._known):
            due = min(due, self.switch_on_arrival(num_tokens))
        return due - max(self.settings.num_queries, 1) - 1


def make_request_lengths(
    granularity: Granularity, num_prompt_tokens: int, settings: CompactionSettings, page_size: int
) -> RequestLengths:
    """The counts of a new request, by what leaves in a compaction, and when the first one comes."""
    if settings.auto is not None:
        return AutoLengths(num_prompt_tokens, settings)
    if granularity == "page":
        return PageLengths(num_prompt_tokens, settings, page_size=page_size)
    return RequestLengths(num_prompt_tokens, settings)
