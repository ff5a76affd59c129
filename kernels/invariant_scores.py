"""Policy ``invariant``'s scores: one program walks the keys of one (layer, request, KV head) three times.

The first walk gathers the softmax statistics of each query and the mean features, the second the attention to
each key and the mean direction of the centred features, the third each key's redundancy. What follows reads
tables of one number a token. All of it is linear in N and runs in one fixed order, so that equal caches get
equal scores. The second and the third walk find most keys in the L2 cache.

Formulas: rkv_spec 4; reference: ``naive_invariant.invariant_scores``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .importance import NO_LOGIT
from .key_features import directions_of, features_of, load_pairs
from .rotary_pairs import RotaryPairs
from .standard_scores import standardise
from .work_slice import WorkSlice, layer_and_head, locate, queries_of, slot_offsets

_TABLE_BLOCK = 1024  # tokens of a table at a time


@dataclass(frozen=True)
class KeyTiles:
    """Launch shape of the walks.

    Attributes:
        rows: queries that take part in a product.
        tokens: keys that do.
        warps: warps a program.
        stages: depth of the pipeline of loads.
    """

    rows: int
    tokens: int
    warps: int
    stages: int


def key_tiles(head_size: int, dtype: torch.dtype) -> KeyTiles:
    """Launch shape for a cache, by what fits into shared memory and registers."""
    if dtype.itemsize == 2 and head_size <= 128:
        return KeyTiles(rows=128, tokens=64, warps=8, stages=3)
    return KeyTiles(rows=32, tokens=32, warps=4, stages=2)


@triton.jit
def _logits(query_a, query_b, a, b, scale, slots, candidates):
    """float32 [queries, tokens], NO_LOGIT for what is no candidate."""
    products = tl.dot(query_a, tl.trans(a), input_precision="ieee")
    products = tl.dot(query_b, tl.trans(b), acc=products, input_precision="ieee")
    return tl.where((slots < candidates)[None, :], products * scale, NO_LOGIT)


@triton.jit(
    do_not_specialize=[
        "stride_pages",
        "stride_score_layer",
        "stride_score_request",
        "stride_score_head",
        "first_layer",
        "first_request",
        "requests",
    ],
    do_not_specialize_on_alignment=["scores"],
)
def _scores_kernel(
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
    lam,  # [R]
    attention,  # [owners, capacity]
    redundancy,  # [owners, capacity]
    scores,  # [layers, requests, H, slots] by its strides
    stride_score_layer,
    stride_score_request,
    stride_score_head,
    scale,
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FEATURES_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,  # of the queries, ROWS each
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TABLE_BLOCK: tl.constexpr,
):
    layer, request, local_request, head, owner = locate(first_layer, first_request, requests, HEADS)
    length = tl.load(lengths + request)
    candidates = length - WINDOW
    attention += owner * capacity
    redundancy += owner * capacity
    pages = source_pages + request * stride_pages
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)
    queries = queries_of(
        queries, stride_layer, stride_row, stride_head, query_rows, layer, request, head, GROUP
    )
    end = tl.load(query_ends + request)
    count = tl.load(query_counts + request)

    feature_sum = tl.zeros((FEATURES_PAD,), tl.float32)
    direction_sum = tl.zeros((FEATURES_PAD,), tl.float32)
    mean = feature_sum
    for part in tl.static_range(PARTS):
        row = part * ROWS + tl.arange(0, ROWS)
        age = row // GROUP
        place = (end - 1 - tl.minimum(age, count - 1)) % RING
        query_a, query_b = load_pairs(
            queries,
            place * stride_query + (row % GROUP) * stride_head,
            HEAD_SIZE,
            ROTATED,
            INTERLEAVED,
            FEATURES_PAD,
        )
        peak = tl.full((ROWS,), NO_LOGIT, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, length, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            inside = slots < length
            offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
            a, b = load_pairs(kv, offsets, HEAD_SIZE, ROTATED, INTERLEAVED, FEATURES_PAD)
            if part == 0:
                features = features_of(a, b, ROTATED, FEATURES_PAD)
                feature_sum += tl.sum(tl.where(inside[:, None], features, 0.0), axis=0)
            logits = _logits(query_a, query_b, a, b, scale, slots, candidates)
            higher = tl.maximum(peak, tl.max(logits, axis=1))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
            peak = higher
        if part == 0:
            mean = feature_sum / length
        share = tl.where(age < count, 1.0 / (total * (count * GROUP)), 0.0)
        for start in range(0, length, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            inside = slots < length
            offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
            a, b = load_pairs(kv, offsets, HEAD_SIZE, ROTATED, INTERLEAVED, FEATURES_PAD)
            if part == 0:
                directions = directions_of(a, b, mean, ROTATED, FEATURES_PAD)
                direction_sum += tl.sum(tl.where(inside[:, None], directions, 0.0), axis=0)
            logits = _logits(query_a, query_b, a, b, scale, slots, candidates)
            attended = tl.sum(tl.exp(logits - peak[:, None]) * share[:, None], axis=0)
            if part > 0:
                attended += tl.load(attention + slots, mask=slots < candidates, other=0.0)
            tl.store(attention + slots, attended, mask=slots < candidates)
        tl.debug_barrier()  # what the next part, or the end, reads was written by other threads

    direction = direction_sum / length
    for start in range(0, length, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        offsets = slot_offsets(pages, slots, slots < length, stride_page, stride_slot, PAGE_SIZE)
        a, b = load_pairs(kv, offsets, HEAD_SIZE, ROTATED, INTERLEAVED, FEATURES_PAD)
        directions = directions_of(a, b, mean, ROTATED, FEATURES_PAD)
        similar = tl.sum(directions * direction[None, :], axis=1)
        tl.store(redundancy + slots, similar, mask=slots < candidates)
    tl.debug_barrier()

    scores += tl.program_id(2).to(tl.int64) * stride_score_layer
    scores += local_request.to(tl.int64) * stride_score_request + head.to(tl.int64) * stride_score_head
    important = tl.load(lam + request)
    standardise(scores, redundancy, attention, candidates, important, POOL, TABLE_BLOCK)


def invariant_scores(
    work: WorkSlice,
    queries: torch.Tensor,
    lam: torch.Tensor,
    scores: torch.Tensor,
    *,
    pairs: RotaryPairs,
    window: int,
    pool_kernel: int,
    scale: float,
    tiles: KeyTiles | None = None,
) -> None:
    """Write the scores of each candidate; ``work.attention`` and ``work.redundancy`` are overwritten.

    Args:
        work: requests and layers.
        queries: [L, rows, ring, Hq, D], the query ring, in the cache's dtype.
        lam: float32 [R], weight of importance of each request of the batch.
        scores: float32 [layers, requests, H, >= longest - window] of the slice, last stride 1.
        pairs: how the model's rotary embedding pairs a head's dimensions.
        window: number of newest keys that are no candidates.
        pool_kernel: odd width, in tokens, of the max-pooling of importance.
        scale: factor on the logits.
        tiles: launch shape; ``key_tiles`` when None.
    """
    kv, batch = work.kv, work.batch
    tiles = tiles or key_tiles(kv.head_size, kv.dtype)
    group = queries.shape[3] // kv.num_heads
    rows = min(tiles.rows, triton.next_power_of_2(max(group * queries.shape[2], 16)))
    _scores_kernel[work.grid()](
        *work.cache_args(),
        queries,
        *queries.stride()[:4],
        batch.query_rows,
        batch.query_ends,
        batch.query_counts,
        batch.source_pages,
        batch.source_pages.stride(0),
        batch.lengths_on_device,
        lam,
        work.attention,
        work.redundancy,
        scores,
        *scores.stride()[:3],
        scale,
        *work.slice_args(),
        HEADS=kv.num_heads,
        RING=queries.shape[2],
        GROUP=group,
        WINDOW=window,
        POOL=pool_kernel,
        HEAD_SIZE=kv.head_size,
        ROTATED=pairs.rotated,
        INTERLEAVED=pairs.interleaved,
        FEATURES_PAD=max(triton.next_power_of_2(pairs.num_features(kv.head_size)), 16),
        PAGE_SIZE=kv.page_size,
        PARTS=-(-group * queries.shape[2] // rows),
        ROWS=rows,
        BLOCK=tiles.tokens,
        TABLE_BLOCK=_TABLE_BLOCK,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
