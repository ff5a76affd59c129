"""Redundancy of keys: each key's newest match, then the sums of similarities without the cut links.

The similarity matrix is symmetric and never leaves the chip. A program owns a block of rows and visits the
tiles of columns from the newest on; each tile serves both sides (a newer match for its own rows, an older
one for the columns), so at most half of the matrix is computed, and a program stops once all of its rows
have a newer match. Tiles that were skipped so are visited by a second pass, only for rows that still need
an older match. The sums themselves follow from the sum of the normalised keys (rkv_spec 4.4 B), in O(N D).

Formulas: rkv_spec 1.4 and 4.4 B and C; reference: ``naive.redundancy``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .importance import load_queries, merged_statistics, tokens_a_program, window_logits
from .part import LINK_SCALE, Part, inverse_norm, slot_offsets

_SUMS_BLOCK = 32  # tokens a program of the second walk
_SUMS_WARPS = 4
_MATCHED = tl.constexpr(0x7FFFFFFF)  # for rows behind the last token: newer than any match


@dataclass(frozen=True)
class MatchTiles:
    """Launch shape of the search for matches.

    Attributes:
        rows: keys a program owns.
        columns: keys it compares them with at a time; a divisor of ``rows``.
        span: column tiles, at most 32, between two checks whether all rows have their match.
        warps: warps a program.
        stages: depth of the pipeline of loads.
        registers: upper bound a thread, so that enough programs fit on a multiprocessor; None for no bound.
    """

    rows: int
    columns: int
    span: int
    warps: int
    stages: int
    registers: int | None = None


def match_tiles(head_size: int, dtype: torch.dtype) -> MatchTiles:
    """Launch shape for a cache: measured on an H200 for 16-bit keys of 128, else sized for shared memory."""
    if dtype.itemsize == 4:
        return MatchTiles(rows=32, columns=32, span=2, warps=4, stages=2)
    if head_size <= 128:
        return MatchTiles(rows=128, columns=128, span=4, warps=8, stages=2)
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
def _excess(
    own,
    bound,
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
):
    """By how much each pair [column, row] of a tile exceeds the threshold times the row's norm.

    A pair is a match if that is above zero. Every comparison goes through this one expression, so that a pair
    within rounding of the threshold is the same everywhere. The columns, which change from tile to tile, are
    the outer axis: a thread then holds few of them, and what it keeps of the rows stays in registers.
    """
    other = _load_keys(kv, pages, columns, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE)
    inverse = tl.load(inverse_norms + columns, mask=columns < length, other=0.0)
    products = tl.dot(other, tl.trans(own), input_precision="ieee")
    return products * inverse[:, None] - bound[None, :]


@triton.jit
def _bounds(inverse_norms, rows, length, threshold):
    inverse = tl.load(inverse_norms + rows, mask=rows < length, other=1.0)
    return tl.where(rows < length, threshold / inverse, float("inf"))


@triton.jit
def _either(left, right):
    return left | right


@triton.jit
def _visit(
    own,
    bound,
    best,
    rows,
    columns,
    newest,
    kv,
    pages,
    inverse_norms,
    length,
    stride_page,
    stride_slot,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Take a tile's matches over: newer ones for the rows (returned), older ones for the columns."""
    excess = _excess(
        own,
        bound,
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
    )
    older = tl.max(tl.where(excess > 0.0, rows[None, :], -1), axis=1)
    tl.atomic_max(newest + columns, older, mask=older > 0, sem="relaxed")
    return tl.maximum(best, tl.max(tl.where(excess > 0.0, columns[:, None], -1), axis=0))


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "blocks"])
def _newer_matches_kernel(
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
    reached,
    threshold,
    first_layer,
    first_request,
    requests,
    capacity,
    blocks,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    # The newest rows first: what they find spares the older rows' programs work.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
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
    pages = source_pages + request * stride_pages
    kv += tl.multiple_of(tl.load(layer_offsets + layer), 16) + head.to(tl.int64) * stride_kv_head

    rows = block * ROWS + tl.arange(0, ROWS)
    own = _load_keys(kv, pages, rows, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE)
    bound = _bounds(inverse_norms, rows, length, threshold)
    best = tl.where(rows < length, -1, _MATCHED)

    own_tile = block * (ROWS // COLUMNS)
    newer_tile = own_tile + ROWS // COLUMNS
    last_tile = (length - 1) // COLUMNS
    end = last_tile + 1  # tiles from here on are done
    if end > newer_tile:  # the newest tile serves most rows, where keys are alike
        end -= 1
        columns = end * COLUMNS + tl.arange(0, COLUMNS)
        best = _visit(
            own,
            bound,
            best,
            rows,
            columns,
            newest,
            kv,
            pages,
            inverse_norms,
            length,
            stride_page,
            stride_slot,
            HEAD_SIZE,
            BLOCK_D,
            PAGE_SIZE,
        )
    while (end > newer_tile) & (tl.min(best, axis=0) < 0):
        start = tl.maximum(end - SPAN, newer_tile)
        # Most tiles tell nothing new: a row with a newer match and a column with one need no other. First
        # find the tiles that do, one bit each. An outdated newest match of a column only costs time.
        row_done = tl.where(best < 0, 0.0, float("inf"))
        worth = tl.zeros((COLUMNS,), tl.int32)
        for step in range(0, end - start):
            columns = (end - 1 - step) * COLUMNS + tl.arange(0, COLUMNS)
            excess = _excess(
                own,
                bound,
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
            )
            known = tl.load(newest + columns, mask=columns < length, other=_MATCHED)
            column_done = tl.where(known < (block + 1) * ROWS, 0.0, float("inf"))
            useful = excess - tl.minimum(column_done[:, None], row_done[None, :])
            worth |= (tl.max(useful, axis=1) > 0.0).to(tl.int32) << step
        tiles = tl.reduce(worth, 0, _either)
        for step in range(0, end - start):
            if (tiles >> step) & 1 > 0:
                columns = (end - 1 - step) * COLUMNS + tl.arange(0, COLUMNS)
                best = _visit(
                    own,
                    bound,
                    best,
                    rows,
                    columns,
                    newest,
                    kv,
                    pages,
                    inverse_norms,
                    length,
                    stride_page,
                    stride_slot,
                    HEAD_SIZE,
                    BLOCK_D,
                    PAGE_SIZE,
                )
        end = start
    if tl.min(best, axis=0) < 0:
        for tile in range(own_tile, tl.minimum(newer_tile, last_tile + 1)):
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            excess = _excess(
                own,
                bound,
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
            )
            match = (excess > 0.0) & (columns[:, None] != rows[None, :])
            best = tl.maximum(best, tl.max(tl.where(match, columns[:, None], -1), axis=0))
    tl.store(reached + owner * blocks + block, end)
    tl.atomic_max(newest + rows, best, mask=(rows < length) & (best > 0), sem="relaxed")


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "blocks"])
def _older_matches_kernel(
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
    reached,
    threshold,
    first_layer,
    first_request,
    requests,
    capacity,
    blocks,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
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
    reached += owner * blocks
    pages = source_pages + request * stride_pages
    kv += tl.multiple_of(tl.load(layer_offsets + layer), 16) + head.to(tl.int64) * stride_kv_head

    rows = block * ROWS + tl.arange(0, ROWS)
    best = tl.load(newest + rows, mask=rows < length, other=_MATCHED)
    older = block - 1
    while (older >= 0) & (tl.min(best, axis=0) < (older + 1) * ROWS):
        # The older block's own program saw these rows unless it stopped at a newer tile.
        if tl.load(reached + older) > block * (ROWS // COLUMNS):
            own = _load_keys(kv, pages, rows, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE)
            bound = _bounds(inverse_norms, rows, length, threshold)
            for tile in range(older * (ROWS // COLUMNS), (older + 1) * (ROWS // COLUMNS)):
                columns = tile * COLUMNS + tl.arange(0, COLUMNS)
                excess = _excess(
                    own,
                    bound,
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
                )
                best = tl.maximum(best, tl.max(tl.where(excess > 0.0, columns[:, None], 0), axis=0))
        older -= 1
    tl.store(newest + rows, best, mask=rows < length)


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
    attention,
    newest,
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
    STATISTICS_BLOCK: tl.constexpr,
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
    d = tl.arange(0, BLOCK_D)
    keys = _load_keys(kv, pages, slots, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE)

    ring_row = tl.load(query_rows + request).to(tl.int64)
    queries += layer.to(tl.int64) * stride_layer + ring_row * stride_ring + head * GROUP * stride_head
    window = load_queries(
        queries, stride_window, stride_head, GROUP, GROUP_PAD, WINDOW, WINDOW_PAD, HEAD_SIZE, BLOCK_D
    )
    logits = window_logits(window, keys, scale, GROUP_PAD, WINDOW_PAD, BLOCK)
    row = tl.arange(0, WINDOW_PAD)
    statistics = owner * blocks * WINDOW
    peak, total = merged_statistics(
        peaks + statistics, totals + statistics, tl.cdiv(length, STATISTICS_BLOCK), WINDOW, WINDOW_PAD
    )
    chance = tl.exp(logits - peak[:, None]) / total[:, None]
    mean = tl.sum(tl.where((row < WINDOW)[:, None], chance, 0.0), axis=0) / WINDOW
    tl.store(attention + table + slots, mean, mask=slots < length - WINDOW)

    if tl.load(lam + request) < 1.0:
        unit = keys.to(tl.float32) * inverse_norm(keys)[:, None]
        exact = tl.load(directions + owner * HEAD_SIZE + d, mask=d < HEAD_SIZE, other=0)
        direction = exact.to(tl.float32) * (1.0 / LINK_SCALE)
        both = tl.sum(unit * (direction[None, :] - unit), axis=1)  # all similarities, less the key's own
        match = tl.load(newest + table + slots, mask=slots < length, other=0)
        partner = _load_keys(
            kv, pages, match, length, stride_page, stride_slot, HEAD_SIZE, BLOCK_D, PAGE_SIZE
        )
        link = tl.sum(unit * partner.to(tl.float32), axis=1) * inverse_norm(partner)
        cut = tl.where(match == slots, 0.0, link)  # only slot 0 without a match: the diagonal is zero
        inside = slots < length
        tl.atomic_add(links + table + slots, (both * LINK_SCALE).to(tl.int64), mask=inside, sem="relaxed")
        tl.atomic_add(links + table + match, (cut * -LINK_SCALE).to(tl.int64), mask=inside, sem="relaxed")


def newest_matches(
    part: Part, lam: torch.Tensor, *, threshold: float, tiles: MatchTiles | None = None
) -> None:
    """Raise ``part.slots`` (zeros) to each key's newest match, given the inverse norms in ``part.weights``.

    Args:
        part: requests and layers, after ``survey``.
        lam: float32 [R], weight of importance of each request of the batch; at 1 a request is left out.
        threshold: cosine similarity above which two keys count as duplicates.
        tiles: launch shape; ``match_tiles`` when None.
    """
    kv, batch = part.kv, part.batch
    tiles = tiles or match_tiles(kv.head_size, kv.dtype)
    grid = (-(-part.longest // tiles.rows), part.requests * kv.num_heads, part.layers)
    arguments = (
        kv.layers[0],
        kv.layer_offsets,
        *kv.layers[0].stride()[:3],
        batch.source_pages,
        batch.source_pages.stride(0),
        batch.lengths_on_device,
        lam,
        part.weights,
        part.slots,
        part.reached,
        threshold,
        part.first_layer,
        part.first_request,
        part.requests,
        part.capacity,
        part.blocks,
    )
    constants = {
        "HEADS": kv.num_heads,
        "HEAD_SIZE": kv.head_size,
        "BLOCK_D": triton.next_power_of_2(kv.head_size),
        "PAGE_SIZE": kv.page_size,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": tiles.registers,
    }
    _newer_matches_kernel[grid](*arguments, SPAN=tiles.span, **constants)
    _older_matches_kernel[grid](*arguments, **constants)


def sums(part: Part, queries: torch.Tensor, lam: torch.Tensor, *, window: int, scale: float) -> None:
    """Second walk over the keys: window attention into ``weights``, sums without cut links into ``links``.

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
    block = _SUMS_BLOCK
    _sums_kernel[(-(-part.longest // block), part.requests * kv.num_heads, part.layers)](
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
        BLOCK=block,
        STATISTICS_BLOCK=tokens_a_program(part),
        num_warps=_SUMS_WARPS,
        num_stages=2,
    )
