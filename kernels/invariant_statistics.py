"""Policy ``invariant``'s first walk over the keys: softmax statistics of the queries, and sums of features.

Formulas: rkv_spec 4.1 to 4.3; reference: ``naive_invariant``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .importance import NO_LOGIT
from .key_features import features_of, load_pairs
from .rotary_pairs import RotaryPairs
from .span_records import LOG2_E, KeyTiles, SpanRecords, key_tiles, span_of
from .work_slice import WorkSlice, layer_and_head, locate, queries_of, slot_offsets


@triton.jit
def load_queries_of_part(
    queries,
    stride_query,
    stride_head,
    end,
    count,
    part,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FEATURES_PAD: tl.constexpr,
):
    """A part of the queries, the newest first, a group's heads innermost; behind the oldest it repeats."""
    row = part * ROWS + tl.arange(0, ROWS)
    place = (end - 1 - tl.minimum(row // GROUP, count - 1)) % RING
    offsets = place * stride_query + (row % GROUP) * stride_head
    return load_pairs(queries, offsets, row < GROUP * RING, HEAD_SIZE, ROTATED, INTERLEAVED, FEATURES_PAD)


@triton.jit(
    do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "stride_owner", "part"]
)
def _statistics_kernel(
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
    factors,  # [L, H]
    first_layer,
    first_request,
    requests,
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
    """The logarithm of each row's sum of exponentials, to the base of two, and the sum of features."""
    layer, request, _, head, owner = locate(first_layer, first_request, requests, HEADS)
    length = tl.load(lengths + request)
    first, last, spans = span_of(length, SHORTEST)
    if tl.program_id(0) >= spans:
        return
    record = records + owner * stride_owner + tl.program_id(0) * RECORD
    pages = source_pages + request * stride_pages
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)
    queries = queries_of(
        queries, stride_layer, stride_row, stride_head, query_rows, layer, request, head, GROUP
    )
    query_a, query_b = load_queries_of_part(
        queries,
        stride_query,
        stride_head,
        tl.load(query_ends + request),
        tl.load(query_counts + request),
        part,
        RING,
        GROUP,
        ROWS,
        HEAD_SIZE,
        ROTATED,
        INTERLEAVED,
        FEATURES_PAD,
    )
    to_base_2 = tl.load(factors + layer * HEADS + head) * LOG2_E
    summed = tl.zeros((BLOCK, FEATURES_PAD), tl.float32)
    peak = tl.full((ROWS,), NO_LOGIT, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < last
        offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
        a, b = load_pairs(kv, offsets, inside, HEAD_SIZE, ROTATED, INTERLEAVED, FEATURES_PAD)
        if FIRST:
            summed += features_of(a, b, ROTATED, FEATURES_PAD)
        products = tl.dot(query_a, tl.trans(a.to(query_a.dtype)), input_precision="ieee")
        products = tl.dot(query_b, tl.trans(b.to(query_b.dtype)), acc=products, input_precision="ieee")
        none = tl.where(inside & (slots < length - WINDOW), 0.0, NO_LOGIT)
        logits = products * to_base_2 + none[None, :]
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), axis=1)
        peak = higher
    tl.store(record + tl.arange(0, ROWS), peak + tl.log2(total))
    if FIRST:
        tl.store(record + ROWS + tl.arange(0, FEATURES_PAD), tl.sum(summed, axis=0))


def query_statistics(
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
    """Write each span's statistics of the queries and its sum of features.

    Args:
        work: requests and layers; ``span_records`` is written.
        queries: [L, rows, ring, Hq, D], the query ring.
        factors: float32 [L, H], on the logits of each layer and KV head.
        records: their shape.
        part: which of the queries; the first part sums the features, too.
        pairs: how the model's rotary embedding pairs a head's dimensions.
        window: number of newest keys that are no candidates.
        tiles: launch shape, if not the usual one.
    """
    _statistics_kernel[records.grid(work)](
        *work.cache_args(),
        *work.query_args(queries),
        work.batch.query_counts,
        *work.token_args(),
        *work.record_args(),
        part,
        factors,
        *work.slice_args()[:3],
        **records.constants(work.kv, pairs, window),
        **records.query_constants(),
        FIRST=part == 0,
        **(tiles or key_tiles(work.kv)).launch(),
    )
