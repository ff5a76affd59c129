"""What running requests will hold of the pool, by counts alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.pool_forecast import Course, Endings, Outlook

PAGE = 16
BUDGET, BUFFER = 160, 48


def held_in(course: Course, steps: int) -> int:
    """Slots after so many steps, each a token, with a compaction first where one is due; 0 at its end."""
    held, most, period, left = course.held, course.most, course.period, course.left
    if steps > left:
        return 0
    for _ in range(steps):
        if held == most and period == 0:
            period = BUFFER
        held = most - period + 1 if held == most else held + 1
    return held


def pages(slots: int) -> int:
    return -(-slots // PAGE)


@st.composite
def a_course(draw: st.DrawFn) -> Course:
    left = draw(st.integers(1, 600))
    if draw(st.booleans()):
        return Course(BUDGET + draw(st.integers(0, BUFFER - 1)), BUDGET + BUFFER, BUFFER, left)
    return Course(draw(st.integers(1, BUDGET + BUFFER)), BUDGET + BUFFER, 0, left)


@given(st.lists(a_course(), max_size=12))
def test_no_step_holds_more_than_is_foretold(courses: list[Course]) -> None:
    """Proves the prediction no less than any step of a simulated run, and little more than the highest."""
    foretold = Outlook(courses, None, 0.0, PAGE).most_pages()
    highest = max(sum(pages(held_in(course, step)) for course in courses) for step in range(1, 400))
    assert highest <= foretold <= highest + 4 * len(courses)


@pytest.mark.parametrize("count", [1, 7, 400])
def test_requests_in_step_are_all_at_their_largest_together(count: int) -> None:
    """Proves that requests compacted in the same step take a whole buffer each, and spread ones half."""
    together = [Course(1024, 1152, 128, 9999)] * count
    assert Outlook(together, None, 0.0, PAGE).most_pages() == 72 * count
    spread = [Course(1024 + index * 128 // count, 1152, 128, 9999) for index in range(count)]
    assert Outlook(spread, None, 0.0, PAGE).most_pages() <= 68.6 * count + 4


def test_requests_make_room_when_they_end() -> None:
    """Proves that a newcomer may count on pages of those whose last token comes before it has grown."""
    ending = [Course(1100, 1152, 128, 200)] * 10
    staying = [Course(1100, 1152, 128, 5000)] * 10
    newcomer = Course(128, 1152, 0, 9000)
    alone = Outlook(ending, newcomer, 0.0, PAGE)
    assert alone.most_pages(newcomer) < 10 * 72 + pages(128 + 200 + 40) + 16
    assert Outlook(staying, newcomer, 0.0, PAGE).most_pages(newcomer) >= 11 * 72
    for _ in range(5):
        alone.add(newcomer)
    assert alone.most_pages(newcomer) >= 6 * 72


def test_nobody_with_a_budget() -> None:
    """Proves that nothing is foretold of requests with full caches, and of a newcomer its own pages alone."""
    assert Outlook([], None, 0.0, PAGE).most_pages() == 0
    newcomer = Course(100, 224, 0, 500)
    assert Outlook([], newcomer, 0.0, PAGE).most_pages(newcomer) == 14


def test_early_endings_are_expected_at_the_rate_at_which_they_came() -> None:
    """Proves the rate right for random lengths, in the face of cut ones, and zero where none ends early."""
    endings, chance = Endings(), random.Random(0)
    for _ in range(4000):
        tokens = int(chance.expovariate(1 / 300))
        endings.ended(min(tokens, 500), early=tokens < 500)
    assert 300 < 1 / endings.rate(running_tokens=0) < 1.4 * 300
    endings = Endings()
    for early in (False, True, True, True, True):
        endings.ended(500, early=early)
    assert endings.rate(running_tokens=1000) == 0.0


def test_room_follows_what_requests_come_to() -> None:
    """Proves that a large budget which few requests fill keeps little room, with a margin for chance."""
    young = [Course(200, 4224, 0, 30000)] * 100
    cautious, learnt = (Outlook(young, None, rate, PAGE).most_pages() for rate in (0.0, 1 / 300))
    assert cautious == 100 * 264
    assert 100 * pages(200) < learnt < 100 * 40
