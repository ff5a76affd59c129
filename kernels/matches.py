"""The search for each key's newest match: the newest key that is more similar than the threshold.

The similarity matrix never leaves the chip. A program owns a block of rows, visits the tiles of columns from
the newest on, and stops once all of its rows have a match. It keeps one number a row: the newest column above
the threshold. The sums of similarities follow from it without the matrix (``window_sums.py``), so that memory
stays O(N).

The matrix is symmetric, which spares most of its older half. A first pass visits the columns from a block's
own first key on, and notes the newest match of the whole block. A second one completes blocks with rows that
have none: it visits the columns of an older block only where that block noted a match as new as this one, for
otherwise no pair between the two can exceed the threshold.

Formulas: rkv_spec 1.3 and 3.1 B and C; reference: ``naive.redundancy``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .work_slice import WorkSlice, layer_and_head, load_rows, locate, offsets_in_pages, slot_offsets

_MATCH = tl.constexpr(0x80000000)  # the bit that marks a match
_BLOCKS_READ = tl.constexpr(32)  # blocks whose newest matches are read at a time


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
    """Launch shape for a cache: measured on an H100 for 16-bit keys of 128, else sized for shared memory and
    registers."""
    if dtype.itemsize == 4:
        return MatchTiles(rows=32, columns=32, span=2, warps=4, stages=2)
    if head_size <= 128:
        # With 168 registers three programs fit a multiprocessor.
        if dtype.itemsize == 1:  # the rows lie in registers, beside which products of 64 columns do not fit
            return MatchTiles(rows=128, columns=32, span=32, warps=4, stages=2, registers=168)
        return MatchTiles(rows=128, columns=64, span=16, warps=4, stages=2, registers=168)
    return MatchTiles(rows=64, columns=64, span=4, warps=4, stages=2)


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests"])
def _matches_kernel(
    kv,  # layer 0 of the cache, [pages, H, page size, 2 D] by its strides
    layer_offsets,  # [L]
    stride_page,
    stride_kv_head,
    stride_slot,
    source_pages,  # [R, pages]
    stride_pages,
    lengths,  # [R]
    lam,  # [R]
    inverse_norms,  # [owners, capacity]
    newest_match,  # [owners, capacity]
    newest_match_of_block,  # [owners, capacity], one entry a block of ROWS keys
    threshold,
    first_layer,
    first_request,
    requests,
    capacity,
    SECOND_PASS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
):
    block = tl.program_id(0) + SECOND_PASS  # nothing is older than the first block
    layer, request, _, head, owner = locate(first_layer, first_request, requests, HEADS)
    length = tl.load(lengths + request)
    if (block * ROWS >= length) | (tl.load(lam + request) >= 1.0):
        return
    inverse_norms += owner * capacity
    newest_match += owner * capacity
    newest_match_of_block += owner * capacity
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    # The newest column visited, with the top bit if it is a match.
    if SECOND_PASS:
        found = tl.load(newest_match + rows, mask=inside, other=0)
        if tl.min(found, axis=0) >= 0:
            return
        farthest = tl.full((_BLOCKS_READ,), -1, tl.int32)
        for first in range(0, block, _BLOCKS_READ):
            older = first + tl.arange(0, _BLOCKS_READ)
            reach = tl.load(newest_match_of_block + older, mask=older < block, other=-1)
            farthest = tl.maximum(farthest, reach)
        if tl.max(farthest, axis=0) < block * ROWS:
            return
        best = tl.where(found < 0, 0, found.to(tl.uint32) | _MATCH)
    else:
        best = tl.where(inside, 0, -1).to(tl.uint32, bitcast=True)

    pages = source_pages + request * stride_pages
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)
    row_offsets = slot_offsets(pages, rows, inside, stride_page, stride_slot, PAGE_SIZE)
    # What lies behind the length is never stored.
    row_keys = load_rows(kv, row_offsets, HEAD_SIZE, BLOCK_D)  # [ROWS, BLOCK_D]
    # A pair is a match if its product, less the column's norm, exceeds the threshold times the row's norm.
    bound = threshold / tl.load(inverse_norms + rows, mask=inside, other=1.0)

    own_tile = block * ROWS // COLUMNS  # the first of the block's own columns
    if SECOND_PASS:
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
        if SECOND_PASS:
            older = (tiles - count) * COLUMNS // ROWS + tl.arange(0, SPAN)  # the blocks of this span
            in_span = older * ROWS < tiles * COLUMNS
            reach = tl.load(newest_match_of_block + older, mask=in_span, other=-1)
            visits = tl.where(tl.max(reach, axis=0) >= block * ROWS, count, 0)
        else:
            visits = count
        # Page numbers are read one tile ahead: so the pipeline spends none of its stages on them.
        page = tl.load(pages + tl.minimum((tiles - 1) * COLUMNS + column, length - 1) // PAGE_SIZE)
        for step in range(0, visits):
            columns = (tiles - 1 - step) * COLUMNS + column
            offsets = offsets_in_pages(page, columns, stride_page, stride_slot, PAGE_SIZE)
            column_keys = load_rows(kv, offsets, HEAD_SIZE, BLOCK_D)  # [COLUMNS, BLOCK_D]
            page = tl.load(pages + tl.maximum(columns - COLUMNS, 0) // PAGE_SIZE)
            inverse = tl.load(inverse_norms + columns, mask=columns < length, other=0.0)
            products = tl.dot(row_keys, tl.trans(column_keys), input_precision="ieee")  # [ROWS, COLUMNS]
            margin = bound[:, None] - products * inverse[None, :]  # negative: a match
            if not SECOND_PASS:
                newest_column = (tiles - step) * COLUMNS - 1
                is_own = newest_column - COLUMNS < (block + 1) * ROWS - 1
                # Mask the diagonal, and columns past the length.
                if is_own | (newest_column >= length):
                    no_pair = (rows[:, None] == columns[None, :]) | (columns >= length)[None, :]
                    margin = tl.where(no_pair, 1.0, margin)
            # The sign of a match's margin becomes the top bit of the column's number.
            sign = margin.to(tl.uint32, bitcast=True) & 0x80000000
            best = tl.maximum(best, tl.max(sign | columns[None, :].to(tl.uint32), axis=1))
        tiles -= count
    matched = tl.where(best < _MATCH, -1, (best & 0x7FFFFFFF).to(tl.int32))
    tl.store(newest_match + rows, matched, mask=inside)
    if not SECOND_PASS:
        tl.store(newest_match_of_block + block, tl.max(tl.where(inside, matched, -1), axis=0))


def newest_matches(
    work: WorkSlice, lam: torch.Tensor, *, threshold: float, tiles: MatchTiles | None = None
) -> None:
    """Write each key's newest match, or -1, to ``work.newest_match``.

    Args:
        work: requests and layers, after ``window_statistics``.
        lam: float32 [R], weight of importance of each request of the batch; at 1 a request is left out.
        threshold: cosine similarity above which two keys count as duplicates.
        tiles: launch shape; ``match_tiles`` when None.
    """
    tiles = tiles or match_tiles(work.kv.head_size, work.kv.dtype)
    for second_pass in (False, True):
        _matches_kernel[work.grid(-(-work.longest // tiles.rows) - second_pass)](
            *work.cache_args(),
            *work.token_args(),
            lam,
            work.inverse_norms,
            work.newest_match,
            work.newest_match_of_block,
            threshold,
            *work.slice_args(),
            SECOND_PASS=second_pass,
            **work.shape_constants(),
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            SPAN=tiles.span,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )
