"""Who owns which row of the query window."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.query_rows import MAX_ROWS, QueryRows, num_query_rows
from rkv_vllm.settings.config import WINDOW


@pytest.mark.parametrize(("seqs", "rows"), [(1, 1), (MAX_ROWS, MAX_ROWS), (MAX_ROWS + 1, MAX_ROWS)])
def test_number_of_rows(seqs: int, rows: int) -> None:
    """Proves that there is a row for each request, up to a bound."""
    assert num_query_rows(seqs) == rows


def test_hold_twice_is_one_row() -> None:
    """Proves that a request keeps its row, and that there is none for others when all are out."""
    rows = QueryRows(2)
    assert all(rows.hold(who, gets_in_line=True) for who in "aba")
    assert rows.row_of("a") != rows.row_of("b")
    assert not rows.hold("c", gets_in_line=True)
    rows.release("a")
    assert rows.hold("c", gets_in_line=True)
    assert sorted(row for _, row in rows.held()) == [0, 1]
    with pytest.raises(KeyError):
        rows.row_of("a")


def test_a_row_goes_to_who_was_first_in_line() -> None:
    """Proves that a freed row is kept for the first in line, and that who leaves the line keeps none."""
    rows = QueryRows(1)
    assert rows.hold("holder", gets_in_line=True)
    assert not any(rows.hold(who, gets_in_line=True) for who in ("first", "second", "third"))
    assert not rows.hold("visitor", gets_in_line=False)
    rows.release("holder")
    assert not rows.hold("second", gets_in_line=True)
    assert not rows.hold("holder", gets_in_line=True)
    rows.release("first")  # it was preempted
    assert not rows.hold("third", gets_in_line=True)
    assert rows.hold("second", gets_in_line=True)
    for who in ("second", "third", "holder"):
        rows.release(who)
    assert rows.hold("visitor", gets_in_line=False)  # whose earlier wish kept no place


@pytest.mark.parametrize(("requests", "num_rows"), [(5, 4), (129, 128), (1024, 128), (7, 1)])
def test_nobody_waits_longer_than_is_promised(requests: int, num_rows: int) -> None:
    """Proves the bound on steps without a row, where every request needs one in every step."""
    rows, used, waited, longest = QueryRows(num_rows), [0] * requests, [0] * requests, 0
    for _ in range(300):
        for who in range(requests):  # rounds come first in a step
            if used[who] == WINDOW:
                rows.release(str(who))
                used[who] = 0
        for who in range(requests):
            if rows.hold(str(who), gets_in_line=True):
                used[who], waited[who] = used[who] + 1, 0
            else:
                waited[who] += 1
        longest = max(longest, *waited)
    assert 0 < longest <= ceil(requests / num_rows) * (WINDOW + 1)


@given(st.lists(st.tuples(st.sampled_from(("hold", "visit", "release")), st.integers(0, 7)), max_size=60))
def test_no_row_is_lost(steps: list[tuple[str, int]]) -> None:
    """Proves that after any holding and releasing each row is in exactly one place."""
    rows = QueryRows(4)
    for what, who in steps:
        if what != "release":
            rows.hold(str(who), gets_in_line=what == "hold")
        else:
            rows.release(str(who))
        rows.check_integrity()
    for who in range(8):
        rows.release(str(who))
    assert rows.held() == []


@pytest.mark.parametrize("damage", [{"a": 0, "b": 0}, {"a": 7}, {}])
def test_integrity_notices(damage: dict[str, int]) -> None:
    """Proves that a row lost, held twice or never made is noticed."""
    rows = QueryRows(2)
    assert rows.hold("a", gets_in_line=True)
    rows._held = damage
    with pytest.raises(AssertionError, match="query rows"):
        rows.check_integrity()
