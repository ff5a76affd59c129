"""Which request owns which row of the query ring (pure).

A row holds the last queries of one request in every layer. Requests need one only in the few steps before a
compaction, so that rows are lent then and taken back when the compaction ran.
"""

from __future__ import annotations

#: Bound on the window's memory, 2 MiB a row for an 8B model. Of 1,024 running requests 64 hold
#: one on average. A request that finds no row waits for one, some steps before its compaction.
MAX_ROWS = 128
#: `query_row` of a round whose policy needs no queries.
NO_QUERY_ROW = -1


def num_query_rows(max_num_seqs: int) -> int:
    """Rows that scheduler and workers both reckon with."""
    return min(max_num_seqs, MAX_ROWS)


class QueryRows:
    """The free list. A row is in exactly one place: free, or held by one request."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(reversed(range(num_rows)))
        self._held: dict[str, int] = {}

    def held(self) -> list[tuple[str, int]]:
        """Request and row of each row that is lent."""
        return list(self._held.items())

    def hold(self, request_id: str) -> bool:
        """Lends the request a row if it has none; False where all rows are out."""
        if request_id not in self._held:
            if not self._free:
                return False
            self._held[request_id] = self._free.pop()
        return True

    def row_of(self, request_id: str) -> int:
        """The row that the request holds."""
        return self._held[request_id]

    def release(self, request_id: str) -> None:
        """Takes the request's row back, if it has one."""
        row = self._held.pop(request_id, None)
        if row is not None:
            self._free.append(row)

    def check_integrity(self) -> None:
        """Raises: AssertionError where a row was lost or is in two places."""
        rows = [*self._free, *self._held.values()]
        assert sorted(rows) == list(range(self.num_rows)), "query rows lost or held twice"
