"""Sums of scores over whole pages, all layers and KV heads; reference: ``naive.page_scores``."""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .work_slice import WorkSlice, locate

SUM_SCALE = 1 << 40
"""Sums are kept as 64-bit integers in units of 2^-40, so that their order does not matter."""

_BLOCK = 1024  # tokens a program
_SUM_SCALE = tl.constexpr(SUM_SCALE)


@triton.jit(
    do_not_specialize=["first_layer", "first_request", "requests", "capacity", "stride_sums"],
)
def _page_sums_kernel(
    lengths,  # [R]
    scores,  # [owners, capacity]
    sums,  # [R, pages]
    stride_sums,
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, request, _, _, owner = locate(first_layer, first_request, requests, HEADS)
    candidates = tl.load(lengths + request) - WINDOW
    first = tl.program_id(0) * BLOCK
    if first >= candidates:
        return
    slots = first + tl.arange(0, BLOCK)
    values = tl.load(scores + owner * capacity + slots, mask=slots < candidates, other=0.0)
    # 16 tokens, a divisor of every page size, at a time.
    grouped = tl.sum(tl.reshape((values * _SUM_SCALE).to(tl.int64), (BLOCK // 16, 16)), axis=1)
    starts = first + 16 * tl.arange(0, BLOCK // 16)
    pages = sums + request * stride_sums + starts // PAGE_SIZE
    tl.atomic_add(pages, grouped, mask=starts < candidates, sem="relaxed")


def add_page_sums(work: WorkSlice, sums: torch.Tensor, *, window: int) -> None:
    """Add ``work.scores`` of each candidate to its page.

    Args:
        work: requests and layers, with their scores.
        sums: int64 [R, pages] of the whole batch, in units of 1 / SUM_SCALE.
        window: number of newest tokens, which have no score.
    """
    _page_sums_kernel[work.grid(-(-work.longest // _BLOCK))](
        work.batch.lengths_on_device,
        work.scores,
        sums,
        sums.stride(0),
        *work.slice_args(),
        HEADS=work.kv.num_heads,
        WINDOW=window,
        PAGE_SIZE=work.kv.page_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
