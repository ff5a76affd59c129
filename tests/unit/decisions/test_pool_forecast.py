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


def slots_after(request: RequestForecast, steps: int) -> int:
    """Slots after `steps` tokens, with a compaction first where one is due; 0 once the request has ended."""
    slots, cycle = request.slots_now, request.cycle_steps
    if steps > request.tokens_remaining:
        return 0
    for _ in range(steps):
        if slots == request.peak_slots and cycle == 0:
            cycle = BUFFER
        slots = request.peak_slots - cycle + 1 if slots == request.peak_slots else slots + 1
    return slots


def pages(slots: int) -> int:
    return -(-slots // PAGE)


@st.composite
def a_request(draw: st.DrawFn) -> RequestForecast:
    remaining = draw(st.integers(1, 600))
    if draw(st.booleans()):
        return RequestForecast(BUDGET + draw(st.integers(0, BUFFER - 1)), BUDGET + BUFFER, BUFFER, remaining)
    return RequestForecast(draw(st.integers(1, BUDGET + BUFFER)), BUDGET + BUFFER, 0, remaining)


@given(st.lists(a_request(), max_size=12))
def test_no_step_holds_more_than_is_forecast(requests: list[RequestForecast]) -> None:
    """Proves the forecast no less than any step of a simulated run, and little more than the highest."""
    forecast = PoolForecast(requests, None, 0.0, PAGE).peak_pages()
    highest = max(sum(pages(slots_after(request, step)) for request in requests) for step in range(1, 400))
    # A request is forecast at its peak at most, and holds its budget at least: a buffer of pages between.
    # Beside them come two standard deviations of where the requests that cycle are.
    cycling = sum(request.cycle_steps > 0 for request in requests)
    deviation = ceil(2 * BUFFER / PAGE / 12**0.5 * cycling**0.5)
    assert highest <= forecast <= highest + min(BUFFER // PAGE * len(requests) + deviation, 4 * len(requests))


@pytest.mark.parametrize("count", [1, 7, 400])
def test_requests_in_step_are_all_at_their_largest_together(count: int) -> None:
    """Proves that requests compacted in the same step take a whole buffer each, and spread ones half."""
    together = [RequestForecast(1024, 1152, 128, 9999)] * count
    assert PoolForecast(together, None, 0.0, PAGE).peak_pages() == 72 * count
    spread = [RequestForecast(1024 + index * 128 // count, 1152, 128, 9999) for index in range(count)]
    assert PoolForecast(spread, None, 0.0, PAGE).peak_pages() <= 68.6 * count + 4


def test_requests_make_room_when_they_end() -> None:
    """Proves that a newcomer may count on pages of those whose last token comes before it has grown."""
    ending = [RequestForecast(1100, 1152, 128, 200)] * 10
    staying = [RequestForecast(1100, 1152, 128, 5000)] * 10
    newcomer = RequestForecast(128, 1152, 0, 9000)
    alone = PoolForecast(ending, newcomer, 0.0, PAGE)
    assert alone.peak_pages(newcomer) < 10 * 72 + pages(128 + 200 + 40) + 16
    assert PoolForecast(staying, newcomer, 0.0, PAGE).peak_pages(newcomer) >= 11 * 72
    for _ in range(5):
        alone.add(newcomer)
    assert alone.peak_pages(newcomer) >= 6 * 72


def test_nobody_with_a_budget() -> None:
    """Proves that nothing is forecast of requests with full caches, and of a newcomer its own pages alone."""
    assert PoolForecast([], None, 0.0, PAGE).peak_pages() == 0
    newcomer = RequestForecast(100, 224, 0, 500)
    assert PoolForecast([], newcomer, 0.0, PAGE).peak_pages(newcomer) == 14


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
    young = [RequestForecast(200, 4224, 0, 30000)] * 100
    cautious, learnt = (PoolForecast(young, None, rate, PAGE).peak_pages() for rate in (0.0, 1 / 300))
    assert cautious == 100 * 264
    assert 100 * pages(200) < learnt < 100 * 40
