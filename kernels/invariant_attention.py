"""Policy ``invariant``'s second walk over the keys: attention to each, and sums of their directions.

Formulas: rkv_spec 4.1 to 4.3; reference: ``naive_invariant``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .importance import NO_LOGIT
from .invariant_statistics import load_queries_of_part
from .key_features import features_of, load_pairs
from .rotary_pairs import RotaryPairs
from .span_records import LOG2_E, KeyTiles, SpanRecords, key_tiles, span_of, sum_of_records
from .work_slice import WorkSlice, layer_and_head, locate, queries_of, slot_offsets


@triton.jit(
    do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "stride_owner", "part"]
)
def _attention_kernel(
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
    query_counts,  # [R]
    source_pages,  # [R, pages]
    stride_pages,
    lengths,  # [R]
    records,  # [owners, spans, RECORD]
    stride_owner,
    part,
    attention,  # [owners, capacity]
    inverse_lengths,  # [owners, capacity]
    factors,  # [L, H]
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FEATURES_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RECORD: tl.constexpr,
    SHORTEST: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The attention of all rows to each key, and the length and direction of its centred features."""
    layer, request, _, head, owner = locate(first_layer, first_request, requests, HEADS)
    length = tl.load(lengths + request)
    first, last, spans = span_of(length, SHORTEST)
    if tl.program_id(0) >= spans:
        return
    records += owner * stride_owner
    attention += owner * capacity
    inverse_lengths += owner * capacity
    pages = source_pages + request * stride_pages
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)
    queries = queries_of(
        queries, stride_layer, stride_row, stride_head, query_rows, layer, request, head, GROUP
    )
    count = tl.load(query_counts + request)
    query_a, query_b = load_queries_of_part(
        queries,
        stride_query,
        stride_head,
        tl.load(query_ends + request),
        count,
        part,
        RING,
        GROUP,
        ROWS,
        HEAD_SIZE,
        ROTATED,
        INTERLEAVED,
        FEATURES_PAD,
    )
    row = tl.arange(0, ROWS)
    peak = tl.full((ROWS,), NO_LOGIT, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for span in range(0, spans):
        some = tl.load(records + span * RECORD + row)
        higher = tl.maximum(peak, some)
        total = total * tl.exp2(peak - higher) + tl.exp2(some - higher)
        peak = higher
    # The mean over all rows is taken in the exponent; rows behind the oldest query's count for nothing.
    counts = (part * ROWS + row < count * GROUP) & (length > WINDOW)
    share = tl.where(counts, peak + tl.log2(total * (count * GROUP)), float("inf"))
    mean = sum_of_records(records + ROWS, spans, RECORD, FEATURES_PAD) / length

    to_base_2 = tl.load(factors + layer * HEADS + head) * LOG2_E
    summed = tl.zeros((BLOCK, FEATURES_PAD), tl.float32)
    for start in range(first, last, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < last
        offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
        a, b = load_pairs(kv, offsets, inside, HEAD_SIZE, ROTATED, INTERLEAVED, FEATURES_PAD)
        if FIRST:
            centred = features_of(a, b, ROTATED, FEATURES_PAD) - mean[None, :]
            inverse = 1.0 / (tl.sqrt(tl.sum(centred * centred, axis=1)) + 1e-8)
            tl.store(inverse_lengths + slots, inverse, mask=inside)
            summed += centred * tl.where(inside, inverse, 0.0)[:, None]
        products = tl.dot(a.to(query_a.dtype), tl.trans(query_a), input_precision="ieee")
        products = tl.dot(b.to(query_b.dtype), tl.trans(query_b), acc=products, input_precision="ieee")
        attended = tl.sum(tl.exp2(products * to_base_2 - share[None, :]), axis=1)
        candidate = inside & (slots < length - WINDOW)
        if not FIRST:
            attended += tl.load(attention + slots, mask=candidate, other=0.0)
        tl.store(attention + slots, attended, mask=candidate)
    if FIRST:
        directions = records + tl.program_id(0) * RECORD + ROWS + FEATURES_PAD
        tl.store(directions + tl.arange(0, FEATURES_PAD), tl.sum(summed, axis=0))


def attention_and_directions(
    work: WorkSlice,
    queries: torch.Tensor,
    factors: torch.Tensor,
    records: SpanRecords,
    part: int,
    *,
    pairs: RotaryPairs,
    window: int,
    tiles: KeyTiles | None = None,
) -> None:
    """Write ``attention``, or add to it, ``inverse_lengths`` and each span's sum of directions.

    Args:
        work: requests and layers, after ``query_statistics``.
        queries: [L, rows, ring, Hq, D], the query ring.
        factors: float32 [L, H], on the logits of each layer and KV head.
        records: their shape.
        part: which of the queries; the first part writes what is not of the attention.
        pairs: how the model's rotary embedding pairs a head's dimensions.
        window: number of newest keys that are no candidates.
        tiles: launch shape, if not the usual one.
    """
    _attention_kernel[records.grid(work)](
        *work.cache_args(),
        *work.query_args(queries),
        work.batch.query_counts,
        *work.token_args(),
        *work.record_args(),
        part,
        work.attention,
        work.inverse_lengths,
        factors,
        *work.slice_args(),
        **records.constants(work.kv, pairs, window),
        **records.query_constants(),
        FIRST=part == 0,
        **(tiles or key_tiles(work.kv)).launch(),
    )
