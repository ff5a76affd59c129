"""Who switches to a smaller cache, and when, where memory is short."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.pressure import Candidate, PoolState, round_milliseconds, to_switch
from rkv_vllm.settings.values import Switch

SWITCH = Switch(2000, 1000)
candidates = st.lists(
    st.builds(
        Candidate,
        request_id=st.just("?"),
        priority=st.integers(0, 2),
        arrival=st.just(0),
        length=st.integers(9, 40_000),
        saved_pages=st.integers(-3, 500),
        tokens_left=st.integers(0, 4000),
        switch=st.just(SWITCH),
    ),
    max_size=40,
).map(
    lambda some: [replace(each, request_id=str(i), arrival=i) for i, each in enumerate(some)],
)
shortages = st.integers(1, 2000)
FILLED = 1000


def candidate(name: str, **changes: int) -> Candidate:
    plain = Candidate(
        request_id=name,
        priority=0,
        arrival=0,
        length=2000,
        saved_pages=50,
        tokens_left=1000,
        switch=SWITCH,
    )
    return replace(plain, **changes)


def names(chosen: list[Candidate]) -> list[str]:
    return [each.request_id for each in chosen]


@given(
    st.integers(0, 500), st.integers(0, 500), st.integers(-100, 500), st.integers(0, 200), st.floats(0.01, 1)
)
def test_shortage_is_what_is_missing(free: int, used: int, growth: int, wanted: int, usage: float) -> None:
    """Proves that with the pages that are short, growth and the next in the queue fit below the usage."""
    pool = PoolState(usable=free + used, free=free, growth=growth, wanted=wanted)
    filled = int(pool.usable * usage)
    assert pool.shortage(usage) == max(used + growth + wanted - filled, 0)


@given(candidates)
def test_nobody_switches_while_there_is_room(some: list[Candidate]) -> None:
    """Proves that no cache is cut where no page is short."""
    assert to_switch(some, shortage=0, filled=FILLED) == []


@given(candidates, shortages)
def test_orders_cover_the_shortage_or_all_there_is(some: list[Candidate], shortage: int) -> None:
    """Proves that the shortage is covered, unless nobody is left or the step has no time for more, and that
    the last one chosen was needed."""
    chosen = to_switch(some, shortage, FILLED)
    saved = [each.saved_pages for each in chosen]
    useful = [each for each in some if each.saved_pages > 0]
    milliseconds = sum(round_milliseconds(each.length) for each in chosen)
    left = [each for each in useful if each not in chosen]
    assert all(each in useful for each in chosen) and len(set(names(chosen))) == len(chosen)
    assert len(chosen) <= 1 or milliseconds <= 10.0
    if sum(saved) < shortage and left:
        assert chosen and milliseconds + max(round_milliseconds(each.length) for each in left) > 10.0
    assert not chosen or sum(saved[:-1]) < shortage + FILLED * 0.05


@given(candidates, shortages)
def test_whoever_is_first_stays_first(some: list[Candidate], shortage: int) -> None:
    """Proves that a larger shortage adds requests to those that switch, and takes none away."""
    fewer, more = to_switch(some, shortage, FILLED), to_switch(some, shortage + 100, FILLED)
    assert more[: len(fewer)] == fewer


@given(candidates, shortages, st.randoms())
def test_the_order_of_candidates_does_not_matter(
    some: list[Candidate], shortage: int, chance: object
) -> None:
    """Proves that who switches follows from the candidates and not from how they are listed."""
    shuffled = list(some)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert to_switch(shuffled, shortage, FILLED) == to_switch(some, shortage, FILLED)


@given(candidates, shortages)
def test_urgent_requests_are_cut_last(some: list[Candidate], shortage: int) -> None:
    """Proves that nobody is cut while a less urgent request that saves something is left alone."""
    chosen = to_switch(some, shortage, FILLED)
    for spared in (each for each in some if each.saved_pages > 0 and each not in chosen):
        for cut in chosen:
            assert cut.priority >= spared.priority


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"priority": 2, "tokens_left": 9, "saved_pages": 10}, {"priority": 1, "saved_pages": 90}),
        ({"saved_pages": 60}, {"saved_pages": 50}),
        ({"arrival": 7}, {"arrival": 3}),
        ({"tokens_left": 64, "saved_pages": 1}, {"tokens_left": 63}),
    ],
    ids=["priority", "pages", "arrival", "nearly done"],
)
def test_who_is_first(first: dict[str, int], second: dict[str, int]) -> None:
    """Proves the order: least urgent, most pages, newest, and at the end of a class who is nearly done."""
    pair = [candidate("second", **second), candidate("first", **first)]
    assert names(to_switch(pair, shortage=10_000, filled=FILLED)) == ["first", "second"]


def test_a_step_is_not_held_up_by_many_switches() -> None:
    """Proves that long switches come one a step, and a single one however long it takes."""
    long = [candidate(str(i), length=16_000, arrival=i) for i in range(3)]
    short = [candidate(str(i), length=1000, arrival=i) for i in range(60)]
    assert names(to_switch(long, 500, FILLED)) == ["2"]
    assert 20 < len(to_switch(short, 10_000, FILLED)) < 40


def test_those_who_save_nothing_are_left_alone() -> None:
    """Proves that a request whose pages others hold too is not cut for nothing."""
    sharers = [candidate("none", saved_pages=0), candidate("less", saved_pages=-2)]
    assert to_switch(sharers, 100, FILLED) == []
