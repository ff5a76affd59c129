"""Policy ``invariant``'s third walk over the keys: how alike each is to all.

Formulas: rkv_spec 4.1 and 4.2; reference: ``naive_invariant.redundancy``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .key_features import features_of, load_pairs
from .rotary_pairs import RotaryPairs
from .span_records import KeyTiles, SpanRecords, key_tiles, span_of, sum_of_records
from .work_slice import WorkSlice, layer_and_head, locate, slot_offsets


@triton.jit(do_not_specialize=["stride_pages", "first_layer", "first_request", "requests", "stride_owner"])
def _redundancy_kernel(
    kv,  # layer 0 of the cache, [pages, H, page size, 2 D] by its strides
    layer_offsets,  # [L]
    stride_page,
    stride_kv_head,
    stride_slot,
    source_pages,  # [R, pages]
    stride_pages,
    lengths,  # [R]
    records,  # [owners, spans, RECORD]
    stride_owner,
    inverse_lengths,  # [owners, capacity]
    redundancy,  # [owners, capacity]
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FEATURES_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RECORD: tl.constexpr,
    SHORTEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The cosine of each candidate's centred features with the mean direction."""
    layer, request, _, head, owner = locate(first_layer, first_request, requests, HEADS)
    length = tl.load(lengths + request)
    first, last, spans = span_of(length, SHORTEST)
    if tl.program_id(0) >= spans:
        return
    records += owner * stride_owner
    inverse_lengths += owner * capacity
    redundancy += owner * capacity
    pages = source_pages + request * stride_pages
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)
    mean = sum_of_records(records + ROWS, spans, RECORD, FEATURES_PAD) / length
    direction = sum_of_records(records + ROWS + FEATURES_PAD, spans, RECORD, FEATURES_PAD) / length
    last = tl.minimum(last, length - WINDOW)
    for start in range(first, last, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < last
        offsets = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
        a, b = load_pairs(kv, offsets, inside, HEAD_SIZE, ROTATED, INTERLEAVED, FEATURES_PAD)
        centred = features_of(a, b, ROTATED, FEATURES_PAD) - mean[None, :]
        inverse = tl.load(inverse_lengths + slots, mask=inside, other=0.0)
        similar = tl.sum(centred * direction[None, :], axis=1) * inverse
        tl.store(redundancy + slots, similar, mask=inside)


def invariant_redundancy(
    work: WorkSlice,
    records: SpanRecords,
    *,
    pairs: RotaryPairs,
    window: int,
    tiles: KeyTiles | None = None,
) -> None:
    """Write ``redundancy``.

    Args:
        work: requests and layers, after ``attention_and_directions``.
        records: their shape.
        pairs: how the model's rotary embedding pairs a head's dimensions.
        window: number of newest keys that are no candidates.
        tiles: launch shape, if not the usual one.
    """
    _redundancy_kernel[records.grid(work)](
        *work.cache_args(),
        *work.token_args(),
        *work.record_args(),
        work.inverse_lengths,
        work.redundancy,
        *work.slice_args(),
        **records.constants(work.kv, pairs, window),
        **(tiles or key_tiles(work.kv)).launch(),
    )
