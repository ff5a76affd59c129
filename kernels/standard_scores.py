"""Standard scores of log-importance and redundancy, weighed against each other (rkv_spec 4.3 and 4.4).

Reference: ``naive_invariant.invariant_scores``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .importance import max_pooled
from .work_slice import WorkSlice, locate, scores_of

_BLOCK = 2048  # tokens at a time
_WARPS = 8


@triton.jit(
    do_not_specialize=[
        "stride_score_layer",
        "stride_score_request",
        "stride_score_head",
        "first_layer",
        "first_request",
        "requests",
    ],
    do_not_specialize_on_alignment=["scores"],
)
def _standard_kernel(
    lengths,  # [R]
    lam,  # [R]
    attention,  # [owners, capacity]
    redundancy,  # [owners, capacity]
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
    candidates = tl.load(lengths + request) - WINDOW
    attention += owner * capacity
    redundancy += owner * capacity
    scores = scores_of(
        scores, stride_score_layer, stride_score_request, stride_score_head, local_request, head
    )
    number = tl.maximum(candidates, 1).to(tl.float32)
    log_sum = tl.zeros((BLOCK,), tl.float32)
    redundant_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < candidates
        pooled = max_pooled(attention, slots, candidates, POOL, BLOCK)
        log_importance = tl.log(pooled + 1e-9)
        tl.store(scores + slots, log_importance, mask=inside)
        log_sum += tl.where(inside, log_importance, 0.0)
        redundant_sum += tl.load(redundancy + slots, mask=inside, other=0.0)
    log_mean = tl.sum(log_sum, axis=0) / number
    redundant_mean = tl.sum(redundant_sum, axis=0) / number
    tl.debug_barrier()  # what follows reads what other threads have written
    log_squares = tl.zeros((BLOCK,), tl.float32)
    redundant_squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < candidates
        log_importance = tl.load(scores + slots, mask=inside, other=log_mean) - log_mean
        redundant = tl.load(redundancy + slots, mask=inside, other=redundant_mean) - redundant_mean
        log_squares += log_importance * log_importance
        redundant_squares += redundant * redundant
    important = tl.load(lam + request)
    log_factor = important / (tl.sqrt(tl.sum(log_squares, axis=0) / number) + 1e-6)
    redundant_factor = (1.0 - important) / (tl.sqrt(tl.sum(redundant_squares, axis=0) / number) + 1e-6)
    for start in range(0, candidates, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < candidates
        log_importance = tl.load(scores + slots, mask=inside, other=0.0) - log_mean
        redundant = tl.load(redundancy + slots, mask=inside, other=0.0) - redundant_mean
        joint = log_importance * log_factor - redundant * redundant_factor
        tl.store(scores + slots, joint, mask=inside)


def standard_scores(
    work: WorkSlice, lam: torch.Tensor, scores: torch.Tensor, *, window: int, pool_kernel: int
) -> None:
    """Write the scores of each candidate, from ``work.attention`` and ``work.redundancy``.

    Args:
        work: requests and layers.
        lam: float32 [R], weight of importance of each request of the batch.
        scores: float32 [layers, requests, H, >= longest - window] of the slice, last stride 1.
        window: number of newest keys that are no candidates.
        pool_kernel: odd width, in tokens, of the max-pooling of importance.
    """
    _standard_kernel[work.grid()](
        work.batch.lengths_on_device,
        lam,
        work.attention,
        work.redundancy,
        scores,
        *scores.stride()[:3],
        *work.slice_args(),
        HEADS=work.kv.num_heads,
        WINDOW=window,
        POOL=pool_kernel,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
