"""Joint scores from window attention and sums of similarities.

Formulas: rkv_spec 1.2 step 6, 1.3 steps 5 and 6, and 1.4; reference: ``naive.rkv_scores``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .importance import max_pooled
from .work_slice import LINK_SCALE, WorkSlice, locate, scores_of

_BLOCK = 1024  # tokens a step


@triton.jit(
    do_not_specialize=[
        "first_layer",
        "first_request",
        "requests",
        "stride_score_layer",
        "stride_score_request",
        "stride_score_head",
    ],
    do_not_specialize_on_alignment=["scores"],
)
def _combine_kernel(
    lengths,  # [R]
    lam,  # [R]
    attention,  # [owners, capacity]
    links,  # [owners, capacity]
    scores,  # [layers, requests, H, slots] by its strides
    stride_score_layer,
    stride_score_request,
    stride_score_head,
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, request, local_request, head, owner = locate(first_layer, first_request, requests, HEADS)
    attention += owner * capacity
    links += owner * capacity
    scores = scores_of(
        scores, stride_score_layer, stride_score_request, stride_score_head, local_request, head
    )
    length = tl.load(lengths + request)
    candidates = length - WINDOW
    important = tl.load(lam + request)
    similar = important < 1.0
    to_mean = 1.0 / (length.to(tl.float32) * LINK_SCALE)

    total = 1.0
    if similar:
        exponentials = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, length, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            mean = tl.load(links + slots, mask=slots < length, other=0).to(tl.float32) * to_mean
            # Means of cosines lie within -1 and 1, so that the softmax needs no shift.
            exponentials += tl.where(slots < length, tl.exp(mean), 0.0)
        total = tl.sum(exponentials, axis=0)
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        pooled = max_pooled(attention, slots, candidates, POOL, BLOCK)
        redundant = tl.zeros((BLOCK,), tl.float32)
        if similar:
            mean = tl.load(links + slots, mask=slots < candidates, other=0).to(tl.float32) * to_mean
            redundant = tl.exp(mean) / total
        joint = important * pooled - (1.0 - important) * redundant
        tl.store(scores + slots, joint, mask=slots < candidates)


def combine(
    work: WorkSlice,
    lam: torch.Tensor,
    scores: torch.Tensor,
    *,
    window: int,
    pool_kernel: int,
) -> None:
    """Joint score of each candidate, from ``work.attention`` and ``work.links``.

    Args:
        work: requests and layers, after ``attention_and_link_sums``.
        lam: float32 [R], weight of importance of each request of the batch.
        scores: float32 [layers, requests, H, >= longest] of the slice, written up to each request's
            candidates.
        window: number of newest keys that are no candidates.
        pool_kernel: odd width, in tokens, of the max-pooling of importance.
    """
    kv, batch = work.kv, work.batch
    _combine_kernel[work.grid()](
        batch.lengths_on_device,
        lam,
        work.attention,
        work.links,
        scores,
        *scores.stride()[:3],
        *work.slice_args(),
        HEADS=kv.num_heads,
        WINDOW=window,
        POOL=pool_kernel,
        BLOCK=_BLOCK,
        num_warps=4,
    )
