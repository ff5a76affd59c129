"""Second walk over the keys: window attention, each key's newest match, and the sums without the cut links.

The similarity matrix never leaves the chip. A program owns a block of rows, visits the tiles of columns from
the newest on, and stops once all of its rows have a match. It keeps one number a row: the newest column above
the threshold. The sums themselves follow from the sum of the normalised keys (rkv_spec 4.4 B), in O(N D), so
that memory stays O(N).

The matrix is symmetric, but computing half of it was measured to be no faster: what a tile tells its columns
then has to cross warps and go through memory, and programs can no longer stop early on their own.

Formulas: rkv_spec 1.3, 1.4 and 4.4 B and C; references: ``naive.importance``, ``naive.redundancy``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .importance import load_queries, window_logits
from .part import LINK_SCALE, Part, slot_offsets

_MATCH = tl.constexpr(0x80000000)  # the bit that marks a match


@dataclass(frozen=True)
class MatchTiles:
    """Launch shape of the search for matches.

    Attributes:
        rows: keys a program owns.
        columns: keys it compares them with at a time; a divisor of ``rows``.
        span: column tiles between two checks whether all rows have their match.
        warps: warps a program.
        stages: depth of the pipeline of loads.
    """

    rows: int
    columns: int
    span: int
    warps: int
    stages: int


def match_tiles(head_size: int, dtype: torch.dtype) -> MatchTiles:
    """Launch shape for a cache: measured on an H200 for 16-bit keys of 128, else sized for shared memory."""
    if dtype.itemsize == 4:
        return MatchTiles(rows=32, columns=32, span=2, warps=4, stages=2)
    if head_size <= 128:
        return MatchTiles(rows=128, columns=128, span=8, warps=4, stages=3)
    return MatchTiles(rows=64, columns=64, span=4, warps=4, stages=2)


@triton.jit
def _load_keys(
    kv, pages, slots, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE: tl.constexpr
):
    inside = slots < length
    d = tl.arange(0, BLOCK_D)
    offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
    return tl.load(
        kv + offsets[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_SIZE)[None, :], other=0.0
    )


@triton.jit
def _newest_in_tile(
    own,
    bound,
    rows,
    columns,
    kv,
    pages,
    inverse_norms,
    length,
    stride_page,
    stride_slot,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Newest match of each row among a tile's columns, with the top bit set; less than that without a match.

    ``bound`` is the threshold times each row's norm. A pair is a match if its product exceeds it: then the
    difference is negative, and its sign becomes the top bit of the column's number.
    """
    other = _load_keys(kv, pages, columns, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE)
    inverse = tl.load(inverse_norms + columns, mask=columns < length, other=0.0)
    products = tl.dot(own, tl.trans(other), input_precision="ieee")
    missing = products * -inverse[None, :] + bound[:, None]
    if DIAGONAL:
        missing = tl.where(rows[:, None] == columns[None, :], 1.0, missing)
    sign = missing.to(tl.uint32, bitcast=True) & 0x80000000
    return tl.max(sign | columns[None, :].to(tl.uint32), axis=1)


@triton.jit
def _bounds(inverse_norms, rows, length, threshold):
    inverse = tl.load(inverse_norms + rows, mask=rows < length, other=1.0)
    return tl.where(rows < length, threshold / inverse, float("inf"))


@triton.jit
def _window_attention(
    keys,
    queries,
    stride_window,
    stride_head,
    peaks,
    totals,
    scale,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Softmax over all candidates, mean over the window: float32 [ROWS]."""
    window = load_queries(
        queries, stride_window, stride_head, GROUP, GROUP_PAD, WINDOW, WINDOW_PAD, HEAD_SIZE, BLOCK_D
    )
    logits = window_logits(window, keys, scale, GROUP_PAD, WINDOW_PAD, ROWS)
    row = tl.arange(0, WINDOW_PAD)
    peak = tl.load(peaks + row, mask=row < WINDOW, other=0.0)
    total = tl.load(totals + row, mask=row < WINDOW, other=1.0)
    chance = tl.exp(logits - peak[:, None]) / total[:, None]
    return tl.sum(tl.where((row < WINDOW)[:, None], chance, 0.0), axis=0) / WINDOW


@triton.jit
def _add_links(
    kv,
    pages,
    rows,
    match,
    length,
    stride_page,
    stride_slot,
    inverse_norms,
    direction,
    links,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds each row's similarities to its column's sum, and takes its cut link from its match's."""
    inside = rows < length
    offsets = slot_offsets(pages, rows, inside, stride_page, stride_slot, PAGE_SIZE)
    match_offsets = slot_offsets(pages, match, inside, stride_page, stride_slot, PAGE_SIZE)
    with_all = tl.zeros((ROWS,), tl.float32)
    with_match = tl.zeros((ROWS,), tl.float32)
    # The keys again, a slice at a time: kept from before the search, they would take its registers.
    for start in tl.static_range(0, BLOCK_D, STEP_D):
        d = start + tl.arange(0, STEP_D)
        mask = inside[:, None] & (d < HEAD_SIZE)[None, :]
        keys = tl.load(kv + offsets[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        partners = tl.load(kv + match_offsets[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        exact = tl.load(direction + d, mask=d < HEAD_SIZE, other=0)
        with_all += tl.sum(keys * (exact.to(tl.float32) * (1.0 / LINK_SCALE))[None, :], axis=1)
        with_match += tl.sum(keys * partners, axis=1)
    inverse = tl.load(inverse_norms + rows, mask=inside, other=0.0)
    own = 1.0 - 1e-8 * inverse  # a normalised key's length, by the epsilon of its norm just below 1
    both = with_all * inverse - own * own  # all similarities, less the key's own
    link = with_match * inverse * tl.load(inverse_norms + match, mask=inside, other=0.0)
    cut = tl.where(match == rows, 0.0, link)  # only slot 0 without a match: the diagonal is zero
    tl.atomic_add(links + rows, (both * LINK_SCALE).to(tl.int64), mask=inside, sem="relaxed")
    tl.atomic_add(links + match, (cut * -LINK_SCALE).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "blocks"])
def _attend_and_link_kernel(
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
    attention,
    links,
    peaks,
    totals,
    directions,
    scale,
    threshold,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1) % HEADS
    local_request = tl.program_id(1) // HEADS
    request = first_request + local_request
    layer = first_layer + tl.program_id(2)
    length = tl.load(lengths + request)
    if block * ROWS >= length:
        return
    owner = ((tl.program_id(2) * requests + local_request) * HEADS + head).to(tl.int64)
    pages = source_pages + request * stride_pages
    kv += tl.multiple_of(tl.load(layer_offsets + layer), 16) + head.to(tl.int64) * stride_kv_head

    rows = block * ROWS + tl.arange(0, ROWS)
    own = _load_keys(kv, pages, rows, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE)
    ring_row = tl.load(query_rows + request).to(tl.int64)
    queries += layer.to(tl.int64) * stride_layer + ring_row * stride_ring + head * GROUP * stride_head
    statistics = owner * blocks * WINDOW
    mean = _window_attention(
        own,
        queries,
        stride_window,
        stride_head,
        peaks + statistics,
        totals + statistics,
        scale,
        GROUP,
        GROUP_PAD,
        WINDOW,
        WINDOW_PAD,
        HEAD_SIZE,
        BLOCK_D,
        ROWS,
    )
    tl.store(attention + owner * capacity + rows, mean, mask=rows < length - WINDOW)
    if tl.load(lam + request) >= 1.0:
        return

    inverse_norms += owner * capacity
    bound = _bounds(inverse_norms, rows, length, threshold)
    best = tl.where(rows < length, 0, -1).to(tl.uint32, bitcast=True)

    own_tile = block * (ROWS // COLUMNS)
    newer_tile = own_tile + ROWS // COLUMNS
    end = tl.cdiv(length, COLUMNS)  # tiles from here on are done
    span = 1  # the newest tile alone serves most rows, where keys are alike
    while (end > newer_tile) & (tl.min(best, axis=0) < _MATCH):
        start = tl.maximum(end - span, newer_tile)
        span = SPAN
        for tile in range(start, end):
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            newest_here = _newest_in_tile(
                own,
                bound,
                rows,
                columns,
                kv,
                pages,
                inverse_norms,
                length,
                stride_page,
                stride_slot,
                HEAD_SIZE,
                BLOCK_D,
                PAGE_SIZE,
                False,
            )
            best = tl.maximum(best, newest_here)
        end = start
    if tl.min(best, axis=0) < _MATCH:
        for tile in range(own_tile, tl.minimum(newer_tile, end)):
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            newest_here = _newest_in_tile(
                own,
                bound,
                rows,
                columns,
                kv,
                pages,
                inverse_norms,
                length,
                stride_page,
                stride_slot,
                HEAD_SIZE,
                BLOCK_D,
                PAGE_SIZE,
                True,
            )
            best = tl.maximum(best, newest_here)
    end = own_tile
    while (end > 0) & (tl.min(best, axis=0) < _MATCH):
        start = tl.maximum(end - span, 0)
        span = SPAN
        for tile in range(start, end):
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            newest_here = _newest_in_tile(
                own,
                bound,
                rows,
                columns,
                kv,
                pages,
                inverse_norms,
                length,
                stride_page,
                stride_slot,
                HEAD_SIZE,
                BLOCK_D,
                PAGE_SIZE,
                False,
            )
            best = tl.maximum(best, newest_here)
        end = start
    match = tl.where(best < _MATCH, 0, best & 0x7FFFFFFF).to(tl.int32)
    match = tl.where(rows < length, match, 0)
    _add_links(
        kv,
        pages,
        rows,
        match,
        length,
        stride_page,
        stride_slot,
        inverse_norms,
        directions + owner * HEAD_SIZE,
        links + owner * capacity,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_D if BLOCK_D <= 64 else 64,
        PAGE_SIZE,
        ROWS,
    )


def attend_and_link(
    part: Part,
    queries: torch.Tensor,
    lam: torch.Tensor,
    *,
    window: int,
    scale: float,
    threshold: float,
    tiles: MatchTiles | None = None,
) -> None:
    """Window attention into ``slots``, sums without cut links into ``links``, after ``survey``.

    Args:
        part: requests and layers, after ``survey``.
        queries: [L, rows, window, Hq, D], the ring of window queries, in the cache's dtype.
        lam: float32 [R], weight of importance of each request of the batch; at 1 its keys are not compared.
        window: number of newest keys that are no candidates.
        scale: factor on the logits.
        threshold: cosine similarity above which two keys count as duplicates.
        tiles: launch shape; ``match_tiles`` when None.
    """
    kv, batch = part.kv, part.batch
    tiles = tiles or match_tiles(kv.head_size, kv.dtype)
    group = queries.shape[3] // kv.num_heads
    window_pad = triton.next_power_of_2(window)
    _attend_and_link_kernel[(-(-part.longest // tiles.rows), part.requests * kv.num_heads, part.layers)](
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
        part.slots.view(torch.float32),
        part.links,
        part.peaks,
        part.totals,
        part.directions,
        scale,
        threshold,
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
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        SPAN=tiles.span,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
