"""When a request with budget "auto" comes down, by its orders and by counts alone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.auto_lengths import NEVER, AutoLengths, make_request_lengths
from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.settings.config import WINDOW, AutoBudget, CompactionSettings
from rkv_vllm.settings.values import Switch

prompts = st.integers(1, 300)
compaction_settings = st.builds(
    CompactionSettings, st.integers(WINDOW + 1, 200), st.integers(WINDOW, 100), st.just("rkv")
)


def auto_lengths(
    prompt: int,
    settings: CompactionSettings,
    max_budget: int | None = None,
    switch_at: tuple[Switch, ...] | None = None,
) -> AutoLengths:
    auto = replace(settings, auto=AutoBudget(max_budget, switch_at))
    lengths = make_request_lengths("token", prompt, auto, page_size=16)
    assert isinstance(lengths, AutoLengths)
    return lengths


def carry_out(lengths: AutoLengths) -> int:
    """The next round, where it is due."""
    due = lengths.next_due
    lengths.compact(due)
    lengths.confirm_compaction(due)
    return due


@given(prompts, compaction_settings, st.integers(0, 10_000), st.integers(1, 10_000))
def test_it_keeps_all_until_it_is_ordered(
    prompt: int, settings: CompactionSettings, logical: int, num_new_tokens: int
) -> None:
    """Proves that without an order nothing is due, no chunk is cut, and everything is held."""
    lengths = auto_lengths(prompt, settings)
    assert lengths.is_undecided and not lengths.is_due(logical)
    assert lengths.end_of_chunk(logical, num_new_tokens) == num_new_tokens
    assert logical + num_new_tokens < lengths.unconstrained_until
    assert lengths.most_slots(logical) == logical


@given(prompts, compaction_settings, st.integers(0, 1000))
def test_it_has_a_fixed_budget_once_it_is_down(
    prompt: int, settings: CompactionSettings, logical: int
) -> None:
    """Proves that an order is due once the queries that it looks at could be captured, and that the rounds
    behind one which leaves the budget are those of the same budget without auto."""
    lengths = auto_lengths(prompt, settings)
    switch = lengths.earliest_switch(logical)
    assert lengths.needed_slots <= switch
    lengths.order(Switch(switch, settings.budget))
    assert not lengths.is_undecided and lengths.next_due == switch
    assert lengths.most_slots(switch) == max(switch, settings.threshold)
    assert lengths.capture_from >= logical and lengths.kept_slots == settings.budget
    carry_out(lengths)
    fixed = RequestLengths(prompt, settings, evicted=switch - settings.budget)
    for _ in range(3):
        assert lengths.physical(lengths.next_due) == settings.threshold
        assert (lengths.next_due, lengths.capture_from) == (fixed.next_due, fixed.capture_from)
        assert list(lengths.switches) == [Switch(switch, settings.budget)] and not lengths.is_undecided
        assert lengths.survivors == settings.budget == fixed.survivors
        carry_out(lengths)
        fixed.compact(fixed.next_due)


@given(prompts, compaction_settings, st.lists(st.integers(0, 400), min_size=1, max_size=8))
def test_it_comes_down_by_halves(prompt: int, settings: CompactionSettings, waits: list[int]) -> None:
    """Proves that each order leaves a half and no less than the budget, that it keeps all that it gets in
    between, that no two rounds look at one query, and that it may be ordered again until it is down."""
    lengths, logical = auto_lengths(prompt, settings), prompt
    slots = prompt
    for wait in waits:
        if lengths.is_at_budget:
            break
        assert lengths.is_undecided and lengths.next_due == NEVER
        logical, slots = logical + wait, slots + wait
        at = lengths.earliest_switch(logical)
        slots += at - logical
        assert lengths.physical(at) == slots
        half = max(slots // 2, settings.budget)
        lengths.order(Switch(at, lengths.half_of(slots)))
        assert lengths.kept_slots == half and lengths.capture_from >= logical
        assert carry_out(lengths) == at
        assert lengths.survivors == half == lengths.physical(at)
        logical, slots = at, half
        assert lengths.capture_from >= logical
    assert lengths.is_at_budget is not lengths.is_undecided
    assert all(one.at < other.at for one, other in zip(lengths.switches, lengths.switches[1:], strict=False))


@given(
    prompts,
    compaction_settings,
    st.lists(st.tuples(st.integers(0, 400), st.booleans()), min_size=1, max_size=6),
    st.booleans(),
)
def test_it_replays_what_it_carried_out(
    prompt: int, settings: CompactionSettings, orders: list[tuple[int, bool]], planned: bool
) -> None:
    """Proves that a preempted request comes down where it did, holds no more on its way than was reckoned,
    and is free again behind that, also where a round was planned and it was preempted in the same step."""
    lengths, logical = auto_lengths(prompt, settings), prompt
    for wait, is_half in orders:
        if not lengths.is_undecided:
            break
        at = lengths.earliest_switch(logical + wait)
        half = lengths.half_of(lengths.physical(at))
        lengths.order(Switch(at, half if is_half else settings.budget))
        logical = carry_out(lengths)
    is_down, switches = lengths.is_at_budget, list(lengths.switches)
    if planned and not is_down:
        at = lengths.earliest_switch(logical)
        lengths.order(Switch(at, settings.budget))
        lengths.compact(at)
    lengths.restart()
    assert lengths.evicted == lengths.survivors == 0 and list(lengths.switches) == switches
    assert lengths.is_undecided is not is_down
    assert lengths.cacheable(logical + 100) < lengths.capture_from
    most, end = lengths.most_slots(logical + 50), logical + 50
    for switch in switches:
        assert lengths.physical(lengths.next_due) <= most
        assert carry_out(lengths) == switch.at
        assert lengths.survivors == switch.kept
    assert lengths.physical(min(end, lengths.next_due)) <= most
    assert list(lengths.switches) == switches and lengths.is_at_budget is is_down


@given(prompts, compaction_settings, st.integers(0, 400), st.integers(0, 400))
def test_an_answer_tells_how_to_have_it_again(
    prompt: int, settings: CompactionSettings, first: int, second: int
) -> None:
    """Proves that a request which is told the steps of another one makes them, and no others."""
    ordered, logical = auto_lengths(prompt, settings), prompt
    for wait in (first, second):
        if ordered.is_undecided:
            at = ordered.earliest_switch(logical + wait)
            ordered.order(Switch(at, ordered.half_of(ordered.physical(at))))
            logical = carry_out(ordered)
    texts = list(map(str, ordered.switches))
    told = auto_lengths(prompt, settings, switch_at=tuple(map(Switch.parse, texts)))
    assert not told.is_undecided
    for switch in ordered.switches:
        assert carry_out(told) == switch.at and told.survivors == switch.kept
    assert told.next_due == ordered.next_due and list(told.switches) == list(ordered.switches)


@given(
    prompts,
    compaction_settings,
    st.lists(st.builds(Switch, st.integers(1, 2000), st.integers(1, 2000)), min_size=1, max_size=5),
)
def test_no_steps_that_anybody_tells_do_harm(
    prompt: int, settings: CompactionSettings, steps: list[Switch]
) -> None:
    """Proves that steps out of order, too close or too small come as soon as they can, leave no less than the
    budget and no more than is there, and never look at a query twice."""
    lengths, last = auto_lengths(prompt, settings, switch_at=tuple(steps)), 0
    assert lengths.needed_slots >= max(prompt, settings.threshold)
    for _ in steps:
        due = lengths.next_due
        assert due >= max(prompt, lengths.evicted + settings.threshold) and lengths.capture_from >= last
        slots = lengths.physical(due)
        assert settings.budget <= lengths.kept_slots < slots
        kept = lengths.kept_slots
        last = carry_out(lengths)
        assert lengths.physical(last) == kept


@given(prompts, compaction_settings, st.integers(1, 2000))
def test_a_bound_is_due_by_counts_alone(prompt: int, settings: CompactionSettings, bound: int) -> None:
    """Proves that it never grows above `max_budget`, but for its prompt and what its budget needs, that a
    half of that stays, and that it may be ordered to come down before."""
    lengths = auto_lengths(prompt, settings, max_budget=bound)
    most = max(bound, settings.threshold)
    assert lengths.is_undecided and lengths.next_due == max(prompt, most)
    assert lengths.needed_slots == max(prompt, settings.threshold)
    lengths.order(Switch(max(prompt, settings.threshold), settings.budget))
    assert lengths.next_due == max(prompt, settings.threshold)
    lengths.restart()
    for _ in range(4):
        slots = lengths.physical(lengths.next_due)
        assert slots <= max(prompt, most, settings.budget + settings.buffer)
        carry_out(lengths)
        assert lengths.survivors == max(slots // 2, settings.budget)


@given(prompts, compaction_settings, st.integers(0, 500))
def test_it_can_switch_on_arrival(prompt: int, settings: CompactionSettings, generated: int) -> None:
    """Proves that what may come from the prefix cache ends before the queries of a switch that is ordered as
    the request arrives, which no token that it has generated has seen."""
    lengths = auto_lengths(prompt, settings)
    num_tokens = prompt + generated
    switch = lengths.switch_on_arrival(num_tokens)
    assert switch >= max(prompt, num_tokens - 1)
    assert lengths.slots_on_arrival(num_tokens) == switch
    assert lengths.cacheable(num_tokens) < switch - settings.num_queries
    lengths.order(Switch(switch, settings.budget))
    assert lengths.cacheable(num_tokens) < lengths.capture_from
    carry_out(lengths)
    lengths.restart()
    assert lengths.cacheable(num_tokens + 100) < lengths.capture_from == switch - max(settings.num_queries, 1)


@given(prompts, compaction_settings, st.integers(0, 20))
def test_what_is_reserved_for_it(prompt: int, settings: CompactionSettings, notice: int) -> None:
    """Proves that room is kept for the prompt until it is computed, then for budget, buffer and the notice of
    a switch, and for the way to a switch that was ordered."""
    lengths = auto_lengths(prompt, settings)
    assert lengths.reserved_slots(prompt, notice) == max(prompt, settings.threshold) + notice
    assert lengths.reserved_slots(0, notice) == settings.threshold + notice
    switch = lengths.earliest_switch(prompt + 100)
    lengths.order(Switch(switch, settings.budget))
    assert lengths.reserved_slots(0, notice) == switch
    carry_out(lengths)
    assert lengths.reserved_slots(0, notice) == settings.threshold
