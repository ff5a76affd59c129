"""What running requests will hold of the pool, by counts alone."""

from __future__ import annotations

import random
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.pool_forecast import EarlyStopRate, PoolForecast, RequestForecast

PAGE = 16
BUDGET, BUFFER = 160, 48


def forecast(
    requests: list[RequestForecast],
    newcomer: RequestForecast | None,
    early_stops: float = 0.0,
    horizon: int = 40_000,
) -> PoolForecast:
    return PoolForecast(requests, newcomer, early_stops, PAGE, horizon)


def own_pages_after(request: RequestForecast, steps: int) -> int:
    """Own pages after `steps` tokens, with a compaction first where one is due; 0 once it has ended."""
    slots, cycle, shared = request.slots_now, request.cycle_steps, request.shared_pages
    if steps > request.steps_remaining:
        return 0
    for _ in range(steps):
        if slots == request.peak_slots and cycle == 0:
            cycle, shared = BUFFER, 0
        slots = request.peak_slots - cycle + 1 if slots == request.peak_slots else slots + 1
    return pages(slots) - shared


def pages(slots: int) -> int:
    return -(-slots // PAGE)


@st.composite
def a_request(draw: st.DrawFn) -> RequestForecast:
    remaining = draw(st.integers(1, 600))
    if draw(st.booleans()):
        return RequestForecast(BUDGET + draw(st.integers(0, BUFFER - 1)), BUDGET + BUFFER, BUFFER, remaining)
    slots_now = draw(st.integers(1, BUDGET + BUFFER))
    shared = draw(st.integers(0, slots_now // PAGE))
    if slots_now + remaining <= BUDGET + BUFFER:
        return RequestForecast(slots_now, slots_now + remaining, 0, remaining, 0, shared)
    return RequestForecast(slots_now, BUDGET + BUFFER, 0, remaining, BUDGET + BUFFER, shared)


@given(st.lists(a_request(), max_size=12))
def test_no_step_holds_more_than_is_forecast(requests: list[RequestForecast]) -> None:
    """Proves the forecast no less than any step of a simulated run, and little more than the highest."""
    forecast_pages = forecast(requests, None).peak_pages()
    highest = max(sum(own_pages_after(request, step) for request in requests) for step in range(1, 400))
    # A request is forecast at its peak at most, and holds its budget at least: a buffer of pages between.
    # Beside them come two standard deviations of where the requests that cycle are.
    cycling = sum(request.cycle_steps > 0 for request in requests)
    deviation = ceil(2 * BUFFER / PAGE / 12**0.5 * cycling**0.5)
    assert (
        highest
        <= forecast_pages
        <= highest + min(BUFFER // PAGE * len(requests) + deviation, 4 * len(requests))
    )


@pytest.mark.parametrize("count", [1, 7, 400])
def test_requests_in_step_are_all_at_their_largest_together(count: int) -> None:
    """Proves that requests compacted in the same step take a whole buffer each, and spread ones half."""
    together = [RequestForecast(1024, 1152, 128, 9999)] * count
    assert forecast(together, None).peak_pages() == 72 * count
    spread = [RequestForecast(1024 + index * 128 // count, 1152, 128, 9999) for index in range(count)]
    assert forecast(spread, None, horizon=1).peak_pages() <= 68.6 * count + 4


def test_requests_make_room_when_they_end() -> None:
    """Proves that a newcomer may count on pages of those whose last token comes before it has grown."""
    ending = [RequestForecast(1100, 1152, 128, 200)] * 10
    staying = [RequestForecast(1100, 1152, 128, 5000)] * 10
    newcomer = RequestForecast(128, 1152, 0, 9000)
    alone = forecast(ending, newcomer)
    assert alone.peak_pages(newcomer) < 10 * 72 + pages(128 + 200 + 40) + 16
    assert forecast(staying, newcomer).peak_pages(newcomer) >= 11 * 72
    for _ in range(5):
        alone.add(newcomer)
    assert alone.peak_pages(newcomer) >= 6 * 72


def test_a_newcomer_that_is_soon_gone_needs_no_room_for_later() -> None:
    """Proves that the growth of others counts while the newcomer is there, and not after that."""
    giants = [RequestForecast(100, 4224, 0, 12_000, 4224)] * 20
    full, now = 20 * pages(4224), 20 * pages(100)
    soon_gone, staying = (RequestForecast(100, 100 + steps, 0, steps) for steps in (10, 12_000))
    for first in (soon_gone, staying):
        running = forecast(giants, first)
        assert now + pages(110) <= running.peak_pages(soon_gone) <= now + 20 * 2 + pages(110)
        assert running.peak_pages(staying) >= full


def test_shared_pages_are_copied_by_the_first_compaction() -> None:
    """Proves that sharers need a prefix of their own from then on, and those that end before never do."""
    shared = pages(400)
    compacted = [RequestForecast(400, 1152, 0, 9000, 1152, shared)] * 10
    assert forecast(compacted, None).peak_pages() == 10 * 72
    ending = [RequestForecast(400, 800, 0, 400, 0, shared)] * 10
    assert forecast(ending, None).peak_pages() == 10 * (pages(800) - shared)


def test_a_long_prompt_is_held_whole_until_its_round() -> None:
    """Proves that a prompt above the budget counts in full for its own steps, and with its budget later."""
    prompt = RequestForecast(8000, 8000, 0, 5000, due_slots=1152, prompt_steps=4)
    others = [RequestForecast(600, 1152, 0, 5000, 1152)] * 50
    assert forecast([prompt], None).peak_pages() == pages(8000)
    assert forecast([*others, prompt], None).peak_pages() == 51 * 72


@pytest.mark.parametrize("early_stops", [0.0, 1 / 300])
def test_lengths_of_millions_of_tokens(early_stops: float) -> None:
    """Proves that neither a long prompt nor a client's `max_tokens` leaves the numbers' range."""
    for length, remaining in ((750_000, 500), (4_000_000, 500), (100, 2**31), (100, 2**62)):
        newcomer = RequestForecast(length, min(length + remaining, 4_100_000), 0, remaining)
        found = forecast([RequestForecast(4096, 4224, 128, 500)] * 5, newcomer, early_stops)
        assert found.peak_pages(newcomer) >= pages(length)


def test_nobody_with_a_budget() -> None:
    """Proves that nothing is forecast of requests with full caches, and of a newcomer its own pages alone."""
    assert forecast([], None).peak_pages() == 0
    newcomer = RequestForecast(100, 224, 0, 500)
    assert forecast([], newcomer).peak_pages(newcomer) == 14


def test_early_endings_are_expected_at_the_rate_at_which_they_came() -> None:
    """Proves the rate right for random lengths, in the face of cut ones, and zero where none ends early."""
    stops, chance = EarlyStopRate(), random.Random(0)
    for _ in range(4000):
        tokens = int(chance.expovariate(1 / 300))
        stops.observe(min(tokens, 500), early=tokens < 500)
    assert 300 < 1 / stops.per_token(running_tokens=0) < 1.4 * 300
    stops = EarlyStopRate()
    for early in (False, True, True, True, True):
        stops.observe(500, early=early)
    assert stops.per_token(running_tokens=1000) == 0.0


def test_room_follows_what_requests_come_to() -> None:
    """Proves that a large budget which few requests fill keeps little room, with a margin for chance."""
    young = [RequestForecast(200, 4224, 0, 30000, 4224)] * 100
    cautious, learnt = (forecast(young, None, rate).peak_pages() for rate in (0.0, 1 / 300))
    assert cautious == 100 * 264
    assert 100 * pages(200) < learnt < 100 * 40
