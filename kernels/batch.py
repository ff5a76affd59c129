"""The requests of one compaction round, as the kernels see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .cache_layout import ALIGNMENT
from .options import Order


class QueryWindow(NamedTuple):
    """Where a request's newest queries are: one row of the ring, each at its position modulo the ring's size.

    Attributes:
        row: of the ring.
        end: one more than the position of the newest.
        num: how many are there, 1 to the ring's size.
    """

    row: int
    end: int
    num: int


#: For requests whose scorer looks at no queries.
NO_QUERIES = QueryWindow(row=0, end=1, num=1)


@dataclass(frozen=True)
class CompactionBatch:
    """The requests of one compaction round.

    Build it with ``CompactionBatch.build``, which checks it. What the host needs to plan launches is kept as
    Python integers, so that planning never waits for the device.

    Attributes:
        lengths: physical length N of each request, in tokens.
        keeps: tokens kept of each request, the window included.
        protects: first tokens of each request that stay whatever their scores.
        order: in which the kept candidates are to lie.
        staged: requests whose target pages could overwrite tokens not yet moved; they go through scratch
            memory.
        highest_page: highest page id in use.
        lengths_on_device: int32 [R].
        keeps_on_device: int32 [R].
        protects_on_device: int32 [R].
        staged_on_device: int32 [R], 1 for a staged request.
        query_rows: int32 [R], row of the query ring that holds the request's newest queries.
        query_ends: int32 [R], one more than the position of the newest of them.
        query_counts: int32 [R], how many there are.
        source_pages: int32 [R, P_src], pages in the order of their tokens; 0 behind a request's last page.
        target_pages: int32 [R, P_dst], where the kept tokens go; 0 behind a request's last page.
    """

    lengths: list[int]
    keeps: list[int]
    protects: list[int]
    order: Order
    staged: list[int]
    highest_page: int
    lengths_on_device: torch.Tensor
    keeps_on_device: torch.Tensor
    protects_on_device: torch.Tensor
    staged_on_device: torch.Tensor
    query_rows: torch.Tensor
    query_ends: torch.Tensor
    query_counts: torch.Tensor
    source_pages: torch.Tensor
    target_pages: torch.Tensor

    @classmethod
    def build(
        cls,
        *,
        lengths: Sequence[int],
        keeps: Sequence[int],
        source_pages: Sequence[Sequence[int]],
        target_pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str,
        queries: Sequence[QueryWindow] | None = None,
        order: Order = "temporal",
        protects: Sequence[int] | None = None,
    ) -> CompactionBatch:
        """Check the requests and send them to the device in one asynchronous copy.

        Args:
            lengths: physical length N of each of the R requests, in tokens.
            keeps: tokens kept of each, at most its length; the round checks it against its window.
            source_pages: page ids that hold each request's tokens, in order; ids behind the last token are
                ignored.
            target_pages: page ids that receive the kept tokens, in order; they may be the request's own
                source pages, in any order, or others, but no page of another request of the batch.
            page_size: tokens a page.
            device: where the kernels run.
            queries: where each request's newest queries are; None: for a scorer that looks at none.
            order: in which the kept candidates are to lie.
            protects: first tokens of each that stay, at most what it keeps less the window; None: none.

        Raises:
            ValueError: no request, unequal list lengths, a count out of range, too few pages, a page or row
                id below zero, queries from before the first, a target page given twice, or one that another
                request of the batch uses.
        """
        count = len(lengths)
        if count == 0:
            raise ValueError("a compaction batch needs at least one request")
        protects = [0] * count if protects is None else list(protects)
        queries = [NO_QUERIES] * count if queries is None else list(queries)
        columns = (keeps, protects, source_pages, target_pages, queries)
        if any(len(column) != count for column in columns):
            raise ValueError("all columns of a batch must name the same number of requests")
        sources: list[list[int]] = []
        targets: list[list[int]] = []
        for index, (length, keep) in enumerate(zip(lengths, keeps, strict=True)):
            if not 1 <= keep <= length:
                raise ValueError(f"request {index}: cannot keep {keep} of {length} tokens")
            if not 0 <= protects[index] <= keep:
                raise ValueError(f"request {index}: cannot protect {protects[index]} of {keep} kept tokens")
            source, target = -(-length // page_size), -(-keep // page_size)
            if len(source_pages[index]) < source or len(target_pages[index]) < target:
                raise ValueError(f"request {index}: {source} source and {target} target pages are needed")
            sources.append(list(source_pages[index][:source]))
            targets.append(list(target_pages[index][:target]))
        if min(map(min, sources)) < 0 or min(map(min, targets)) < 0:
            raise ValueError("page ids must not be negative")
        _check_queries(queries)
        _check_owners(sources, targets)

        staged = [
            int(_overwrites(source, target, order)) for source, target in zip(sources, targets, strict=True)
        ]
        source_width, target_width = max(map(len, sources)), max(map(len, targets))
        tables = [list(lengths), list(keeps), protects, staged, *map(list, zip(*queries, strict=True))]
        tables.append([page for row in sources for page in row + [0] * (source_width - len(row))])
        tables.append([page for row in targets for page in row + [0] * (target_width - len(row))])
        views = _send(tables, torch.device(device))
        return cls(
            lengths=list(lengths),
            keeps=list(keeps),
            protects=protects,
            order=order,
            staged=[index for index, flag in enumerate(staged) if flag],
            highest_page=max(max(map(max, sources)), max(map(max, targets))),
            lengths_on_device=views[0],
            keeps_on_device=views[1],
            protects_on_device=views[2],
            staged_on_device=views[3],
            query_rows=views[4],
            query_ends=views[5],
            query_counts=views[6],
            source_pages=views[7].view(count, source_width),
            target_pages=views[8].view(count, target_width),
        )

    @classmethod
    def to_score(
        cls, *, lengths: Sequence[int], source_pages: torch.Tensor, queries: Sequence[QueryWindow]
    ) -> CompactionBatch:
        """Requests that are scored and not moved, whose pages only the device knows.

        Args:
            lengths: physical length N of each of the R requests, in tokens.
            source_pages: int32 [R, >= pages of the longest], contiguous, on the device; ids behind a
                request's last token are not read.
            queries: where each request's newest queries are.

        Raises:
            ValueError: no request, or queries as in ``build``.
        """
        if not lengths:
            raise ValueError("a compaction batch needs at least one request")
        _check_queries(queries)
        columns = [list(lengths), [0] * len(lengths), *map(list, zip(*queries, strict=True))]
        on_device, zeros, rows, ends, counts = _send(columns, source_pages.device)
        return cls(
            lengths=list(lengths),
            keeps=list(lengths),
            protects=[0] * len(lengths),
            order="temporal",
            staged=[],
            highest_page=0,
            lengths_on_device=on_device,
            keeps_on_device=on_device,
            protects_on_device=zeros,
            staged_on_device=zeros,
            query_rows=rows,
            query_ends=ends,
            query_counts=counts,
            source_pages=source_pages,
            target_pages=source_pages,
        )

    @property
    def num_requests(self) -> int:
        return len(self.lengths)


def _send(columns: Sequence[list[int]], device: torch.device) -> list[torch.Tensor]:
    """Tables on the device, int32, in one asynchronous copy."""
    packed: list[int] = []
    starts: list[int] = []
    for column in columns:
        packed += [0] * (-len(packed) % ALIGNMENT)  # every table starts aligned
        starts.append(len(packed))
        packed += column
    host = torch.from_numpy(np.array(packed, dtype=np.int32))  # a third of torch.tensor's time
    if device.type == "cuda":
        host = host.pin_memory()
    tables = host.to(device, non_blocking=True)
    return [tables[start : start + len(column)] for start, column in zip(starts, columns, strict=True)]


def _overwrites(source: list[int], target: list[int], order: Order) -> bool:
    """Whether moving the survivors one after the other could overwrite one that has not moved yet.

    In temporal order a survivor never moves to a later slot. So the source page at position b is done once
    target position b is written, and only a target page that sits at a later position in the source is a
    danger. In any other order every source page is.
    """
    if order != "temporal":
        return not set(source).isdisjoint(target)
    if source[: len(target)] == target:  # nearly always
        return False
    position = {page: index for index, page in enumerate(source)}
    return any(position.get(page, -1) > index for index, page in enumerate(target))


def _check_queries(queries: Sequence[QueryWindow]) -> None:
    if any(row < 0 or not 1 <= num <= end for row, end, num in queries):
        raise ValueError("query rows must not be negative, and queries not lie before position 0")


def _check_owners(sources: list[list[int]], targets: list[list[int]]) -> None:
    owner: dict[int, int] = {}
    for index, target in enumerate(targets):
        for page in target:
            if page in owner:
                raise ValueError(f"request {index}: target page {page} is given twice")
            owner[page] = index
    for index, source in enumerate(sources):
        for page in source:
            if owner.get(page, index) != index:
                raise ValueError(f"page {page} of request {index} is a target of request {owner[page]}")
