"""Second pass over the keys: attention of the window, and sums of similarities without the cut links.

The sums follow from the sum of the normalised keys and each key's newest match (rkv_spec 3.1 B), in O(N D).
Formulas: rkv_spec 1.2 (importance), 1.3 and 3.1 B (redundancy); references: ``naive.importance``,
``naive.redundancy``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .decode import decoded
from .importance import load_queries, query_constants, window_logits
from .work_slice import LINK_SCALE, WorkSlice, layer_and_head, load_rows, locate, queries_of, slot_offsets

_BLOCK = 32  # tokens a program
_WARPS = 2
_STEP = 64  # columns of a key that are taken at a time


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "blocks"])
def _sums_kernel(
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
    lam,  # [R]
    inverse_norms,  # [owners, capacity]
    newest_match,  # [owners, capacity]
    attention,  # [owners, capacity], the same memory
    links,  # [owners, capacity]
    peaks,  # [owners, blocks, WINDOW]
    totals,  # [owners, blocks, WINDOW]
    directions,  # [owners, D]
    factors,  # [L, H]
    first_layer,
    first_request,
    requests,
    capacity,
    blocks,
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
    STEP: tl.constexpr,
):
    layer, request, _, head, owner = locate(first_layer, first_request, requests, HEADS)
    length = tl.load(lengths + request)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= length:
        return
    table = owner * capacity
    pages = source_pages + request * stride_pages
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)
    inside = slots < length
    match = tl.maximum(
        tl.load(newest_match + table + slots, mask=inside, other=0), 0
    )  # slot 0 stands for none
    tl.debug_barrier()  # attention goes where the matches were
    row_offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
    # What lies behind the length goes nowhere.
    keys = load_rows(kv, row_offsets, HEAD_SIZE, BLOCK_D)  # [BLOCK, BLOCK_D]

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
    row = tl.arange(0, WINDOW_PAD)
    statistics = owner * blocks * WINDOW + row
    peak = tl.load(peaks + statistics, mask=row < WINDOW, other=0.0)
    total = tl.load(totals + statistics, mask=row < WINDOW, other=1.0)
    chance = tl.exp(logits - peak[:, None]) / total[:, None]
    mean = tl.sum(tl.where((row < WINDOW)[:, None], chance, 0.0), axis=0) / WINDOW
    tl.store(attention + table + slots, mean, mask=slots < length - WINDOW)

    if tl.load(lam + request) < 1.0:
        inverse_norms += table
        match_offsets = slot_offsets(pages, match, inside, stride_page, stride_slot, PAGE_SIZE)
        with_all = tl.zeros((BLOCK,), tl.float32)
        with_match = tl.zeros((BLOCK,), tl.float32)
        for start in tl.static_range(0, BLOCK_D, STEP):  # in slices, for whole rows would fill the registers
            d = start + tl.arange(0, STEP)
            mask = inside[:, None] & (d < HEAD_SIZE)[None, :]
            some = tl.load(kv + row_offsets[:, None] + d[None, :], mask=mask, other=0.0)
            some = decoded(some).to(tl.float32)
            others = tl.load(kv + match_offsets[:, None] + d[None, :], mask=mask, other=0.0)
            others = decoded(others).to(tl.float32)
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


def attention_and_link_sums(
    work: WorkSlice, queries: torch.Tensor, factors: torch.Tensor, lam: torch.Tensor, *, window: int
) -> None:
    """Write ``attention`` in place of ``newest_match``, and the sums without cut links to ``links``.

    Args:
        work: requests and layers, after ``newest_matches``.
        queries: [L, rows, ring, Hq, D], the query ring.
        factors: float32 [L, H], on the logits of each layer and KV head.
        lam: float32 [R], weight of importance of each request of the batch.
        window: newest tokens, whose queries are looked at.
    """
    kv = work.kv
    _sums_kernel[work.grid(-(-work.longest // _BLOCK))](
        *work.cache_args(),
        *work.query_args(queries),
        *work.token_args(),
        lam,
        work.inverse_norms,
        work.newest_match,
        work.attention,
        work.links,
        work.peaks,
        work.totals,
        work.directions,
        factors,
        *work.slice_args(),
        work.blocks,
        **work.shape_constants(),
        **query_constants(queries, kv.num_heads, window),
        BLOCK=_BLOCK,
        STEP=min(triton.next_power_of_2(kv.head_size), _STEP),
        num_warps=_WARPS if kv.dtype.itemsize <= 2 and kv.head_size <= 128 else 8,
    )
