"""First pass over the keys: the softmax statistics of importance, and what redundancy needs of each key.

One program reads some tokens of one (layer, request, KV head). Formulas: rkv_spec 1.2 (importance) and
3.1 B (the sum of the normalised keys); reference: ``naive.importance``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .decode import decoded
from .work_slice import LINK_SCALE, WorkSlice, inverse_norm, layer_and_head, locate, queries_of, slot_offsets

NO_LOGIT = tl.constexpr(-3.0e38)
"""Logit of what is no candidate: finite, so that a block without candidates needs no special case."""

_BLOCK = 64  # tokens a program
_WARPS = 2


@triton.jit
def load_queries(
    queries,
    stride_query,
    stride_head,
    end,  # one more than the position of the newest
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[WINDOW_PAD * GROUP_PAD, BLOCK_D], the newest token first, its group of query heads innermost.

    Padding repeats a row, which no maximum notices.
    """
    index = tl.arange(0, WINDOW_PAD * GROUP_PAD)
    row = (end + RING - 1 - tl.minimum(index // GROUP_PAD, WINDOW - 1)) % RING
    head = tl.minimum(index % GROUP_PAD, GROUP - 1)
    d = tl.arange(0, BLOCK_D)
    offsets = row * stride_query + head * stride_head
    return tl.load(queries + offsets[:, None] + d[None, :], mask=(d < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def window_logits(
    queries, keys, factor, GROUP_PAD: tl.constexpr, WINDOW_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """Logits of the window's rows, the largest of each group of query heads: float32 [WINDOW_PAD, BLOCK].

    ``factor`` points at the factor on them: read behind the products, it costs no register before.
    """
    products = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
    return tl.max(tl.reshape(products, (WINDOW_PAD, GROUP_PAD, BLOCK)), axis=1) * tl.load(factor)


@triton.jit
def max_pooled(attention, slots, candidates, POOL: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK]: the largest attention to a candidate and those beside it (rkv_spec 1.2 step 6)."""
    pooled = tl.zeros((BLOCK,), tl.float32)  # attention is never negative
    for shift in tl.static_range(POOL):
        near = slots + (shift - POOL // 2)
        value = tl.load(attention + near, mask=(near >= 0) & (near < candidates), other=0.0)
        pooled = tl.maximum(pooled, value)
    return pooled


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "stat_blocks"])
def _survey_kernel(
    kv,  # layer 0 of the cache, [pages, H, page size, 2 D] by its strides
    layer_offsets,  # [L]
    stride_page,
    stride_kv_head,
    stride_slot,
    queries,  # [L, rows, RING, Hq, D]
    stride_layer,
    stride_row,
    stride_query,
    stride_head,
    query_rows,  # [R]
    query_ends,  # [R]
    source_pages,  # [R, pages]
    stride_pages,
    lengths,  # [R]
    inverse_norms,  # [owners, capacity]
    links,  # [owners, capacity]
    peaks,  # [owners, stat_blocks, WINDOW]
    totals,  # [owners, stat_blocks, WINDOW]
    directions,  # [owners, D]
    factors,  # [L, H]
    first_layer,
    first_request,
    requests,
    capacity,
    stat_blocks,
    HEADS: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    layer, request, _, head, owner = locate(first_layer, first_request, requests, HEADS)
    length = tl.load(lengths + request)
    if block * BLOCK >= length:
        return
    table = owner * capacity
    pages = source_pages + request * stride_pages
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)

    slots = block * BLOCK + tl.arange(0, BLOCK)
    inside = slots < length
    d = tl.arange(0, BLOCK_D)
    offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
    mask = inside[:, None] & (d < HEAD_SIZE)[None, :]
    keys = decoded(tl.load(kv + offsets[:, None] + d[None, :], mask=mask, other=0.0))  # [BLOCK, BLOCK_D]

    inverse = inverse_norm(keys)  # [BLOCK]
    direction = tl.sum(keys.to(tl.float32) * inverse[:, None], axis=0)  # [BLOCK_D]
    exact = (direction * LINK_SCALE).to(tl.int64)
    tl.atomic_add(directions + owner * HEAD_SIZE + d, exact, mask=d < HEAD_SIZE, sem="relaxed")
    tl.store(inverse_norms + table + slots, inverse, mask=inside)
    tl.store(links + table + slots, tl.zeros((BLOCK,), tl.int64), mask=inside)

    queries = queries_of(
        queries, stride_layer, stride_row, stride_head, query_rows, layer, request, head, GROUP
    )
    window = load_queries(
        queries,
        stride_query,
        stride_head,
        tl.load(query_ends + request),
        RING,
        GROUP,
        GROUP_PAD,
        WINDOW,
        WINDOW_PAD,
        HEAD_SIZE,
        BLOCK_D,
    )
    factor = factors + layer * HEADS + head
    logits = window_logits(window, keys, factor, GROUP_PAD, WINDOW_PAD, BLOCK)  # [WINDOW_PAD, BLOCK]
    logits = tl.where((slots < length - WINDOW)[None, :], logits, NO_LOGIT)
    peak = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - peak[:, None]), axis=1)
    row = tl.arange(0, WINDOW_PAD)
    statistics = (owner * stat_blocks + block) * WINDOW + row
    tl.store(peaks + statistics, peak, mask=row < WINDOW)
    tl.store(totals + statistics, total, mask=row < WINDOW)


@triton.jit(do_not_specialize=["first_layer", "first_request", "requests", "blocks"])
def _merge_kernel(
    peaks,  # [owners, blocks, WINDOW]
    totals,  # [owners, blocks, WINDOW]
    lengths,  # [R]
    first_layer,
    first_request,
    requests,
    blocks,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax statistics of all candidates from those of each block of them, into the first block's place."""
    _, request, _, _, owner = locate(first_layer, first_request, requests, HEADS)
    peaks += owner * blocks * WINDOW
    totals += owner * blocks * WINDOW
    used = tl.cdiv(tl.load(lengths + request), BLOCK)
    row = tl.arange(0, WINDOW_PAD)
    peak = tl.full((WINDOW_PAD,), NO_LOGIT, tl.float32)
    total = tl.zeros((WINDOW_PAD,), tl.float32)
    for start in range(0, used, 64):
        index = start + tl.arange(0, 64)
        inside = (index < used)[:, None] & (row < WINDOW)[None, :]
        entries = index[:, None] * WINDOW + row[None, :]
        some_peaks = tl.load(peaks + entries, mask=inside, other=NO_LOGIT)  # [64, WINDOW_PAD]
        some_totals = tl.load(totals + entries, mask=inside, other=0.0)
        higher = tl.maximum(peak, tl.max(some_peaks, axis=0))
        total = total * tl.exp(peak - higher)
        total += tl.sum(some_totals * tl.exp(some_peaks - higher[None, :]), axis=0)
        peak = higher
    tl.debug_barrier()  # every thread has read before the first block's place is overwritten
    tl.store(peaks + row, peak, mask=row < WINDOW)
    tl.store(totals + row, total, mask=row < WINDOW)


def query_constants(queries: torch.Tensor, heads: int, window: int) -> dict[str, int]:
    """Shapes of the window's queries, padded to what ``tl.dot`` takes: at least 16 rows.

    Args:
        queries: [L, rows, ring, Hq, D].
        heads: KV heads a layer.
        window: newest queries that are looked at.
    """
    group = queries.shape[3] // heads
    window_pad = triton.next_power_of_2(window)
    return {
        "RING": queries.shape[2],
        "GROUP": group,
        "GROUP_PAD": max(triton.next_power_of_2(group), 16 // window_pad),
        "WINDOW": window,
        "WINDOW_PAD": window_pad,
    }


def window_statistics(work: WorkSlice, queries: torch.Tensor, factors: torch.Tensor, *, window: int) -> None:
    """Fill ``inverse_norms``, ``peaks``, ``totals`` and ``directions``; zero ``links``.

    Args:
        work: requests and layers, with scratch memory.
        queries: [L, rows, ring, Hq, D], the query ring.
        factors: float32 [L, H], on the logits of each layer and KV head.
        window: newest tokens, whose queries are looked at.
    """
    kv, batch = work.kv, work.batch
    constants = query_constants(queries, kv.num_heads, window)
    block = _BLOCK if kv.dtype.itemsize <= 2 and kv.head_size <= 128 else 32
    work.directions.zero_()
    _survey_kernel[work.grid(-(-work.longest // block))](
        *work.cache_args(),
        *work.query_args(queries),
        *work.token_args(),
        work.inverse_norms,
        work.links,
        work.peaks,
        work.totals,
        work.directions,
        factors,
        *work.slice_args(),
        work.blocks,
        **work.shape_constants(),
        **constants,
        BLOCK=block,
        num_warps=_WARPS if block == _BLOCK else 8,
    )
    _merge_kernel[work.grid()](
        work.peaks,
        work.totals,
        batch.lengths_on_device,
        work.first_layer,
        work.first_request,
        work.requests,
        work.blocks,
        HEADS=kv.num_heads,
        WINDOW=constants["WINDOW"],
        WINDOW_PAD=constants["WINDOW_PAD"],
        BLOCK=block,
        num_warps=1,
    )
