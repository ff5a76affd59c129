"""Movement of the survivors, keys and values together, into the target pages.

One program moves one (layer, request, KV head) from the first target slot on. Where survivors keep their
order, none moves to a later slot: what a step overwrites has been read already, and no scratch memory is
needed. Requests whose target pages break that rule (``CompactionBatch.staged``) go through scratch memory
instead, a slice of columns at a time. Reference: ``naive.compact``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from .work_slice import WorkSlice, layer_and_head, locate, slot_offsets

_TOKENS = 64  # tokens a step
_WARPS = 8
STAGED_COLUMNS = 16
"""Elements of a token row that go through scratch memory together."""


@triton.jit
def _source_slots(kept, tokens, keep, length, WINDOW: tl.constexpr):
    """Where the tokens of the compacted request lie now: chosen candidates, then the window."""
    chosen = tl.load(kept + tokens, mask=tokens < keep - WINDOW, other=0)
    return tl.where(tokens < keep - WINDOW, chosen, length - keep + tokens)


@triton.jit(
    do_not_specialize=["stride_source", "stride_target", "first_layer", "first_request", "requests"],
)
def _move_kernel(
    kv,  # layer 0 of the cache, [pages, H, page size, 2 D] by its strides
    layer_offsets,  # [L]
    stride_page,
    stride_kv_head,
    stride_slot,
    source_pages,  # [R, pages]
    stride_source,
    target_pages,  # [R, pages]
    stride_target,
    lengths,  # [R]
    keeps,  # [R]
    staged,  # [R]
    kept,  # [owners, capacity]
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    layer, request, _, head, owner = locate(first_layer, first_request, requests, HEADS)
    if tl.load(staged + request) > 0:
        return
    kept += owner * capacity
    length = tl.load(lengths + request)
    keep = tl.load(keeps + request)
    source_pages += request * stride_source
    target_pages += request * stride_target
    kv = layer_and_head(kv, layer_offsets, layer, head, stride_kv_head)
    column = tl.arange(0, BLOCK_WIDTH)
    for start in range(0, keep, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        inside = tokens < keep
        mask = inside[:, None] & (column < WIDTH)[None, :]
        slots = _source_slots(kept, tokens, keep, length, WINDOW)
        source = slot_offsets(source_pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
        target = slot_offsets(target_pages, tokens, inside, stride_page, stride_slot, PAGE_SIZE)
        data = tl.load(kv + source[:, None] + column[None, :], mask=mask)
        tl.debug_barrier()  # every thread of the program has read before one of them overwrites
        tl.store(kv + target[:, None] + column[None, :], data, mask=mask)


@triton.jit(
    do_not_specialize=[
        "stride_source",
        "stride_target",
        "stride_unit",
        "first_layer",
        "request",
        "local_request",
        "requests",
        "first_unit",
    ],
)
def _stage_kernel(
    kv,  # layer 0 of the cache, [pages, H, page size, 2 D] by its strides
    layer_offsets,  # [L]
    stride_page,
    stride_kv_head,
    stride_slot,
    source_pages,  # [R, pages]
    stride_source,
    target_pages,  # [R, pages]
    stride_target,
    lengths,  # [R]
    keeps,  # [R]
    kept,  # [owners, capacity]
    scratch,  # [units, keep, COLUMNS]
    stride_unit,
    first_layer,
    request,
    local_request,
    requests,
    first_unit,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):
    unit = first_unit + tl.program_id(1)
    local_layer = unit // (HEADS * (WIDTH // COLUMNS))
    head = unit // (WIDTH // COLUMNS) % HEADS
    column = unit % (WIDTH // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    owner = (local_layer * requests + local_request) * HEADS + head
    kept += owner.to(tl.int64) * capacity
    length = tl.load(lengths + request)
    keep = tl.load(keeps + request)
    kv = layer_and_head(kv, layer_offsets, first_layer + local_layer, head, stride_kv_head)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < keep
    scratch += tl.program_id(1).to(tl.int64) * stride_unit
    copy = scratch + tokens[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if WRITE_BACK:
        pages = target_pages + request * stride_target
        target = slot_offsets(pages, tokens, inside, stride_page, stride_slot, PAGE_SIZE)
        data = tl.load(copy, mask=inside[:, None])
        tl.store(kv + target[:, None] + column[None, :], data, mask=inside[:, None])
    else:
        pages = source_pages + request * stride_source
        slots = _source_slots(kept, tokens, keep, length, WINDOW)
        source = slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE)
        data = tl.load(kv + source[:, None] + column[None, :], mask=inside[:, None])
        tl.store(copy, data, mask=inside[:, None])


def compact(work: WorkSlice, *, window: int) -> None:
    """Move the survivors of every (layer, request, KV head) of the slice into the target pages.

    Args:
        work: requests and layers, after ``select``; staged requests need ``longest * STAGED_COLUMNS``
            elements of ``work.staging``.
        window: number of newest tokens, which are kept without a score.
    """
    kv, batch = work.kv, work.batch
    width = 2 * kv.head_size
    pages = (
        batch.source_pages,
        batch.source_pages.stride(0),
        batch.target_pages,
        batch.target_pages.stride(0),
        batch.lengths_on_device,
        batch.keeps_on_device,
    )
    _move_kernel[work.grid()](
        *work.cache_args(),
        *pages,
        batch.staged_on_device,
        work.kept,
        *work.slice_args(),
        HEADS=kv.num_heads,
        WINDOW=window,
        WIDTH=width,
        BLOCK_WIDTH=triton.next_power_of_2(width),
        PAGE_SIZE=kv.page_size,
        TOKENS=_TOKENS if width * kv.dtype.itemsize <= 512 else _TOKENS // 4,
        num_warps=_WARPS,
    )
    for request in batch.staged:
        local_request = request - work.first_request
        if not 0 <= local_request < work.requests:
            continue
        stride_unit = batch.keeps[request] * STAGED_COLUMNS
        units = work.layers * kv.num_heads * (width // STAGED_COLUMNS)
        together = min(work.staging.numel() // stride_unit, 65535)  # the limit of a launch's second axis
        for first_unit in range(0, units, together):
            grid = (-(-batch.keeps[request] // _TOKENS), min(together, units - first_unit))
            for write_back in (False, True):
                _stage_kernel[grid](
                    *work.cache_args(),
                    *pages,
                    work.kept,
                    work.staging,
                    stride_unit,
                    work.first_layer,
                    request,
                    local_request,
                    work.requests,
                    first_unit,
                    work.capacity,
                    HEADS=kv.num_heads,
                    WINDOW=window,
                    WIDTH=width,
                    COLUMNS=STAGED_COLUMNS,
                    PAGE_SIZE=kv.page_size,
                    TOKENS=_TOKENS,
                    WRITE_BACK=write_back,
                    num_warps=4,
                )
