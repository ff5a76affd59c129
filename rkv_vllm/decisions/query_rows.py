"""Which request owns which row of the query ring (pure).

A row holds the last queries of one request in every layer. Requests need one only in the few steps before a
compaction, so that rows are lent then and taken back when the compaction ran.

With a buffer as small as the number of queries a request needs a row in every step, and more such requests
than rows would leave none for others. So whoever finds none gets in line, and a row goes to the request that
has been in line longest. A row is out for as many steps of its holder as its policy looks at queries, and the
step of its round. Of N running requests that share R rows none therefore waits for more than
ceil(N / R) * (queries + 1) steps in which the others decode: 81 steps for 1,024 requests of policy `rkv`.
"""

from __future__ import annotations

from itertools import islice

#: Bound on the ring's memory, 4 MiB a row for an 8B model. Of 1,024 running requests 64 of policy `rkv` hold
#: one on average. A request that finds no row waits for one, some steps before its compaction.
MAX_ROWS = 128
#: `query_row` of a round whose policy needs no queries.
NO_QUERY_ROW = -1


def num_query_rows(max_num_seqs: int) -> int:
    """Rows that scheduler and workers both reckon with."""
    return min(max_num_seqs, MAX_ROWS)


class QueryRows:
    """The free list, and the line before it. A row is in exactly one place: free, or held by one request."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(reversed(range(num_rows)))
        self._held: dict[str, int] = {}
        self._in_line: dict[str, None] = {}  # who found no row, the first to get one first

    def held(self) -> list[tuple[str, int]]:
        """Request and row of each row that is lent."""
        return list(self._held.items())

    def hold(self, request_id: str, *, gets_in_line: bool) -> bool:
        """Lends the request a row if it has none.

        Args:
            request_id: who needs a row now.
            gets_in_line: whether it will ask in each step until it has one, so that a row may be kept for it.

        Returns: False where all rows are out, or kept for those that are further ahead in line.
        """
        if request_id in self._held:
            return True
        if request_id in self._in_line:
            its_turn = request_id in islice(self._in_line, len(self._free))
        else:
            its_turn = len(self._in_line) < len(self._free)
        if its_turn:
            self._in_line.pop(request_id, None)
            self._held[request_id] = self._free.pop()
        elif gets_in_line:
            self._in_line[request_id] = None
        return its_turn

    def row_of(self, request_id: str) -> int:
        """The row that the request holds."""
        return self._held[request_id]

    def release(self, request_id: str) -> None:
        """Takes back the request's row, or its place in line, if it has one."""
        self._in_line.pop(request_id, None)
        row = self._held.pop(request_id, None)
        if row is not None:
            self._free.append(row)

    def check_integrity(self) -> None:
        """Raises: AssertionError where a row was lost or is in two places, or its holder is still in line."""
        rows = [*self._free, *self._held.values()]
        assert sorted(rows) == list(range(self.num_rows)), "query rows lost or held twice"
        assert not self._held.keys() & self._in_line.keys(), "who holds a query row is in line for one"
