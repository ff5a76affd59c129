"""Redundancy of keys: each key's newest match, then the sums of similarities without the cut links.

The similarity matrix never leaves the chip. A program owns a block of rows, visits the tiles of columns from
the newest on, and stops once all of its rows have a match. It keeps one number a row: the newest column above
the threshold. The sums themselves follow from the sum of the normalised keys (rkv_spec 4.4 B), in O(N D), so
that memory stays O(N).

The matrix is symmetric, which spares most of its older half. A first launch visits the columns from a block's
own first key on, and notes the newest match of the whole block. A second one completes blocks with rows that
have none: it visits the columns of an older block only where that block noted a match as new as this one, for
otherwise no pair between the two can exceed the threshold.

Formulas: rkv_spec 1.4 and 4.4 B and C; reference: ``naive.redundancy``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .importance import load_queries, window_logits
from .work_slice import LINK_SCALE, Part, load_rows, offsets_in_pages, slot_offsets

_SUMS_BLOCK = 32  # tokens a program of the second walk
_SUMS_WARPS = 2
_SUMS_STEP = 64  # columns of a key that the second walk takes at a time
_MATCH = tl.constexpr(0x80000000)  # the bit that marks a match
_REACHES = tl.constexpr(32)  # blocks whose newest matches are read at a time


@dataclass(frozen=True)
class MatchTiles:
    """Launch shape of the search for matches.

    Attributes:
        rows: keys a program owns.
        columns: keys it compares them with at a time.
        span: column tiles between two checks whether all rows have their match.
        warps: warps a program.
        stages: depth of the pipeline of loads.
        registers: most registers a thread, or None to leave it to the compiler.
    """

    rows: int
    columns: int
    span: int
    warps: int
    stages: int
    registers: int | None = None


def match_tiles(head_size: int, dtype: torch.dtype) -> MatchTiles:
    """Launch shape for a cache: measured on an H100 for 16-bit keys of 128, else sized for shared memory."""
    if dtype.itemsize == 4:
        return MatchTiles(rows=32, columns=32, span=2, warps=4, stages=2)
    if head_size <= 128:
        # With 168 registers three programs fit a multiprocessor.
        return MatchTiles(rows=128, columns=64, span=16, warps=4, stages=2, registers=168)
    return MatchTiles(rows=64, columns=64, span=4, warps=4, stages=2)


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests"])
def _matches_kernel(
    kv,
    layer_offsets,
    stride_page,
    stride_kv_head,
    stride_slot,
    source_pages,
    stride_pages,
    lengths,
    lam,
    inverse_norms,
    newest,
    reaches,
    threshold,
    first_layer,
    first_request,
    requests,
    capacity,
    OLDER: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    block = tl.program_id(0) + OLDER  # nothing is older than the first block
    head = tl.program_id(1) % HEADS
    local_request = tl.program_id(1) // HEADS
    request = first_request + local_request
    layer = first_layer + tl.program_id(2)
    length = tl.load(lengths + request)
    if (block * ROWS >= length) | (tl.load(lam + request) >= 1.0):
        return
    owner = ((tl.program_id(2) * requests + local_request) * HEADS + head).to(tl.int64)
    inverse_norms += owner * capacity
    newest += owner * capacity
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    # The newest column visited, with the top bit if it is a match.
    if OLDER:
        found = tl.load(newest + rows, mask=inside, other=0)
        if tl.min(found, axis=0) >= 0:
            return
        farthest = tl.full((_REACHES,), -1, tl.int32)
        for first in range(0, block, _REACHES):
            older = first + tl.arange(0, _REACHES)
            reach = tl.load(reaches + owner * capacity + older, mask=older < block, other=-1)
            farthest = tl.maximum(farthest, reach)
        if tl.max(farthest, axis=0) < block * ROWS:
            return
        best = tl.where(found < 0, 0, found.to(tl.uint32) | _MATCH)
    else:
        best = tl.where(inside, 0, -1).to(tl.uint32, bitcast=True)

    pages = source_pages + request * stride_pages
    kv += tl.multiple_of(tl.load(layer_offsets + layer), 16) + head.to(tl.int64) * stride_kv_head
    own_offsets = slot_offsets(pages, rows, inside, stride_page, stride_slot, PAGE_SIZE)
    own = load_rows(kv, own_offsets, HEAD_SIZE, BLOCK_D)  # what lies behind the length is never stored
    # A pair is a match if its product, less the column's norm, exceeds the threshold times the row's norm.
    bound = threshold / tl.load(inverse_norms + rows, mask=inside, other=1.0)

    own_tile = block * ROWS // COLUMNS  # the first of the block's own columns
    if OLDER:
        tiles = own_tile  # those still to visit end here
        oldest = 0
        span = SPAN
    else:
        tiles = tl.cdiv(length, COLUMNS)
        oldest = own_tile
        span = 1  # the newest tile alone serves most rows, where keys are alike
    column = tl.arange(0, COLUMNS)
    while (tiles > oldest) & (tl.min(best, axis=0) < _MATCH):
        count = tl.minimum(span, tiles - oldest)
        span = SPAN
        if OLDER:
            older = (tiles - count) * COLUMNS // ROWS + tl.arange(0, SPAN)  # the blocks of this span
            reach = tl.load(reaches + owner * capacity + older, mask=older * ROWS < tiles * COLUMNS, other=-1)
            visits = tl.where(tl.max(reach, axis=0) >= block * ROWS, count, 0)
        else:
            visits = count
        # Page numbers are read one tile ahead: so the pipeline spends none of its stages on them.
        page = tl.load(pages + tl.minimum((tiles - 1) * COLUMNS + column, length - 1) // PAGE_SIZE)
        for step in range(0, visits):
            columns = (tiles - 1 - step) * COLUMNS + column
            offsets = offsets_in_pages(page, columns, stride_page, stride_slot, PAGE_SIZE)
            other = load_rows(kv, offsets, HEAD_SIZE, BLOCK_D)
            page = tl.load(pages + tl.maximum(columns - COLUMNS, 0) // PAGE_SIZE)
            inverse = tl.load(inverse_norms + columns, mask=columns < length, other=0.0)
            products = tl.dot(own, tl.trans(other), input_precision="ieee")
            missing = bound[:, None] - products * inverse[None, :]
            if not OLDER:
                newest_column = (tiles - step) * COLUMNS - 1
                is_own = newest_column - COLUMNS < (block + 1) * ROWS - 1
                # A key is no match of its own, and what is no key of none.
                if is_own | (newest_column >= length):
                    no_pair = (rows[:, None] == columns[None, :]) | (columns >= length)[None, :]
                    missing = tl.where(no_pair, 1.0, missing)
            # Of a match the difference is negative: its sign becomes the top bit of the column's number.
            sign = missing.to(tl.uint32, bitcast=True) & 0x80000000
            best = tl.maximum(best, tl.max(sign | columns[None, :].to(tl.uint32), axis=1))
        tiles -= count
    matched = tl.where(best < _MATCH, -1, (best & 0x7FFFFFFF).to(tl.int32))
    tl.store(newest + rows, matched, mask=inside)
    if not OLDER:
        tl.store(reaches + owner * capacity + block, tl.max(tl.where(inside, matched, -1), axis=0))


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "blocks"])
def _sums_kernel(
    kv,
    layer_offsets,
    stride_page,
    stride_kv_head,
    stride_slot,
    queries,
    stride_layer,
    stride_ring,
    stride_window,
    stride_head,
    query_rows,
    source_pages,
    stride_pages,
    lengths,
    lam,
    inverse_norms,
    newest,
    attention,
    links,
    peaks,
    totals,
    directions,
    scale,
    first_layer,
    first_request,
    requests,
    capacity,
    blocks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    head = tl.program_id(1) % HEADS
    local_request = tl.program_id(1) // HEADS
    request = first_request + local_request
    layer = first_layer + tl.program_id(2)
    length = tl.load(lengths + request)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= length:
        return
    owner = ((tl.program_id(2) * requests + local_request) * HEADS + head).to(tl.int64)
    table = owner * capacity
    pages = source_pages + request * stride_pages
    kv += tl.multiple_of(tl.load(layer_offsets + layer), 16) + head.to(tl.int64) * stride_kv_head
    inside = slots < length
    match = tl.maximum(tl.load(newest + table + slots, mask=inside, other=0), 0)  # slot 0 stands for none
    tl.debug_barrier()  # attention goes where the matches were
    own = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
    keys = load_rows(kv, own, HEAD_SIZE, BLOCK_D)  # what lies behind the length goes nowhere

    ring_row = tl.load(query_rows + request).to(tl.int64)
    queries += layer.to(tl.int64) * stride_layer + ring_row * stride_ring + head * GROUP * stride_head
    window = load_queries(
        queries, stride_window, stride_head, GROUP, GROUP_PAD, WINDOW, WINDOW_PAD, HEAD_SIZE, BLOCK_D
    )
    logits = window_logits(window, keys, scale, GROUP_PAD, WINDOW_PAD, BLOCK)
    row = tl.arange(0, WINDOW_PAD)
    statistics = owner * blocks * WINDOW + row
    peak = tl.load(peaks + statistics, mask=row < WINDOW, other=0.0)
    total = tl.load(totals + statistics, mask=row < WINDOW, other=1.0)
    chance = tl.exp(logits - peak[:, None]) / total[:, None]
    mean = tl.sum(tl.where((row < WINDOW)[:, None], chance, 0.0), axis=0) / WINDOW
    tl.store(attention + table + slots, mean, mask=slots < length - WINDOW)

    if tl.load(lam + request) < 1.0:
        inverse_norms += table
        partner = slot_offsets(pages, match, inside, stride_page, stride_slot, PAGE_SIZE)
        with_all = tl.zeros((BLOCK,), tl.float32)
        with_match = tl.zeros((BLOCK,), tl.float32)
        for start in tl.static_range(0, BLOCK_D, STEP):  # in slices, for whole rows would fill the registers
            d = start + tl.arange(0, STEP)
            mask = inside[:, None] & (d < HEAD_SIZE)[None, :]
            some = tl.load(kv + own[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            others = tl.load(kv + partner[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            exact = tl.load(directions + owner * HEAD_SIZE + d, mask=d < HEAD_SIZE, other=0)
            with_all += tl.sum(some * (exact.to(tl.float32) * (1.0 / LINK_SCALE))[None, :], axis=1)
            with_match += tl.sum(some * others, axis=1)
        inverse = tl.load(inverse_norms + slots, mask=inside, other=0.0)
        unit = 1.0 - 1e-8 * inverse  # length of a normalised key: by the norm's epsilon just below 1
        both = with_all * inverse - unit * unit  # all similarities, less the key's own
        link = with_match * inverse * tl.load(inverse_norms + match, mask=inside, other=0.0)
        cut = tl.where(match == slots, 0.0, link)  # only slot 0 without a match: the diagonal is zero
        tl.atomic_add(links + table + slots, (both * LINK_SCALE).to(tl.int64), mask=inside, sem="relaxed")
        tl.atomic_add(links + table + match, (cut * -LINK_SCALE).to(tl.int64), mask=inside, sem="relaxed")


def newest_matches(
    part: Part, lam: torch.Tensor, *, threshold: float, tiles: MatchTiles | None = None
) -> None:
    """Write each key's newest match, or -1, to ``part.slots``, given the inverse norms in ``part.weights``.

    Args:
        part: requests and layers, after ``survey``.
        lam: float32 [R], weight of importance of each request of the batch; at 1 a request is left out.
        threshold: cosine similarity above which two keys count as duplicates.
        tiles: launch shape; ``match_tiles`` when None.
    """
    kv, batch = part.kv, part.batch
    tiles = tiles or match_tiles(kv.head_size, kv.dtype)
    for older in (False, True):
        _matches_kernel[(-(-part.longest // tiles.rows) - older, part.requests * kv.num_heads, part.layers)](
            kv.layers[0],
            kv.layer_offsets,
            *kv.layers[0].stride()[:3],
            batch.source_pages,
            batch.source_pages.stride(0),
            batch.lengths_on_device,
            lam,
            part.weights,
            part.slots,
            part.scores.view(torch.int32),  # scores come later
            threshold,
            part.first_layer,
            part.first_request,
            part.requests,
            part.capacity,
            OLDER=older,
            HEADS=kv.num_heads,
            HEAD_SIZE=kv.head_size,
            BLOCK_D=triton.next_power_of_2(kv.head_size),
            PAGE_SIZE=kv.page_size,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            SPAN=tiles.span,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )


def sums(part: Part, queries: torch.Tensor, lam: torch.Tensor, *, window: int, scale: float) -> None:
    """Second walk over the keys: window attention into ``slots``, sums without cut links into ``links``.

    Args:
        part: requests and layers, after ``newest_matches``.
        queries: [L, rows, window, Hq, D], the ring of window queries, in the cache's dtype.
        lam: float32 [R], weight of importance of each request of the batch.
        window: number of newest keys that are no candidates.
        scale: factor on the logits.
    """
    kv, batch = part.kv, part.batch
    group = queries.shape[3] // kv.num_heads
    window_pad = triton.next_power_of_2(window)
    _sums_kernel[(-(-part.longest // _SUMS_BLOCK), part.requests * kv.num_heads, part.layers)](
        kv.layers[0],
        kv.layer_offsets,
        *kv.layers[0].stride()[:3],
        queries,
        *queries.stride()[:4],
        batch.query_rows,
        batch.source_pages,
        batch.source_pages.stride(0),
        batch.lengths_on_device,
        lam,
        part.weights,
        part.slots,
        part.slots.view(torch.float32),
        part.links,
        part.peaks,
        part.totals,
        part.directions,
        scale,
        part.first_layer,
        part.first_request,
        part.requests,
        part.capacity,
        part.blocks,
        HEADS=kv.num_heads,
        GROUP=group,
        GROUP_PAD=max(triton.next_power_of_2(group), 16 // window_pad),
        WINDOW=window,
        WINDOW_PAD=window_pad,
        HEAD_SIZE=kv.head_size,
        BLOCK_D=triton.next_power_of_2(kv.head_size),
        PAGE_SIZE=kv.page_size,
        BLOCK=_SUMS_BLOCK,
        STEP=min(triton.next_power_of_2(kv.head_size), _SUMS_STEP),
        num_warps=_SUMS_WARPS if kv.dtype.itemsize == 2 and kv.head_size <= 128 else 8,
    )
