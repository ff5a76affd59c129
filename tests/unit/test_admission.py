"""What running requests will still take of the pool, by counts alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.admission import Cycle, Growth, pages_to_come

PAGE = 16


def cycles(draw: st.DrawFn) -> Cycle:
    low = draw(st.integers(9, 200))
    high = low + draw(st.integers(1, 100))
    return Cycle(draw(st.integers(low, high - 1)), low, high)


def pages(requests: list[Cycle]) -> int:
    return sum(-(-request.held // PAGE) for request in requests)


def step(request: Cycle) -> Cycle:
    """A request after one step: compacted if it was full, and a token longer."""
    held = request.low if request.held == request.high else request.held
    return Cycle(held + 1, request.low, request.high)


@given(st.lists(st.composite(cycles)(), max_size=12))
def test_pages_to_come_are_those_of_a_run(requests: list[Cycle]) -> None:
    """Proves the prediction never below the most pages of a simulated run, nor a page a request above."""
    predicted = pages(requests) + pages_to_come(requests, PAGE)
    held, most = requests, pages(requests)
    for _ in range(max((request.high - request.low for request in requests), default=0)):
        held = [step(request) for request in held]
        most = max(most, pages(held))
    assert most <= predicted <= most + len(requests)


@pytest.mark.parametrize("requests", [1, 7, 400])
def test_requests_in_step_are_all_at_their_largest_together(requests: int) -> None:
    """Proves that requests compacted in the same step reserve a whole buffer each, and spread ones half."""
    together = pages_to_come([Cycle(1024, 1024, 1152)] * requests, PAGE)
    assert together == 8 * requests
    spread = [Cycle(1024 + index * 128 // requests, 1024, 1152) for index in range(requests)]
    assert pages(spread) + pages_to_come(spread, PAGE) <= 68.6 * requests + 4


def test_nobody_with_a_budget() -> None:
    """Proves that requests with full caches reserve nothing."""
    assert pages_to_come([], PAGE) == 0


def test_room_is_kept_for_the_whole_growth_at_first() -> None:
    """Proves what a young request reserves: pages up to its most slots, and never less than nothing."""
    growth = Growth(PAGE)
    assert growth.to_come(held=128, most=1152) == 64
    assert growth.to_come(held=129, most=1152) == 63
    assert growth.to_come(held=5000, most=1152) == 0


def test_requests_that_end_early_give_room_back() -> None:
    """Proves that a reserve follows what requests come to, down and up again."""
    growth = Growth(PAGE)
    for _ in range(200):
        growth.ended(prompt=100, held=100 + 200, most=4096 + 128)
    assert growth.share == pytest.approx(12 / 257, abs=0.02)
    for _ in range(200):
        growth.ended(prompt=100, held=4224, most=4224)
    assert growth.share == pytest.approx(1.0, abs=0.02)
    before = growth.share
    growth.ended(prompt=2000, held=2000, most=2000)  # could not grow: says nothing
    assert growth.share == before
