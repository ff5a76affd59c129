"""Who owns which row of the query window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.decisions.query_rows import MAX_ROWS, QueryRows, num_query_rows


@pytest.mark.parametrize(("seqs", "rows"), [(1, 1), (MAX_ROWS, MAX_ROWS), (MAX_ROWS + 1, MAX_ROWS)])
def test_number_of_rows(seqs: int, rows: int) -> None:
    """Proves that there is a row for each request, up to a bound."""
    assert num_query_rows(seqs) == rows


def test_hold_twice_is_one_row() -> None:
    """Proves that a request keeps its row, and that there is none for others when all are out."""
    rows = QueryRows(2)
    assert rows.hold("a") and rows.hold("b") and rows.hold("a")
    assert rows.row_of("a") != rows.row_of("b")
    assert not rows.hold("c")
    rows.release("a")
    assert rows.hold("c")
    assert sorted(row for _, row in rows.held()) == [0, 1]
    with pytest.raises(KeyError):
        rows.row_of("a")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_no_row_is_lost(steps: list[tuple[bool, int]]) -> None:
    """Proves that after any holding and releasing each row is in exactly one place."""
    rows = QueryRows(4)
    for holds, who in steps:
        if holds:
            rows.hold(str(who))
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
    assert rows.hold("a")
    rows._held = damage
    with pytest.raises(AssertionError, match="query rows"):
        rows.check_integrity()
