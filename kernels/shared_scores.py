"""One set of scores for all KV heads of a layer, or of all layers, in place of each head's own.

Heads and layers are added one after the other by the program that owns the tokens, so that the sums do not
depend on how a request was cut into slices, nor on what else is in the batch. Formula: rkv_spec 1.8;
reference: ``naive.shared_scores``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .work_slice import WorkSlice

_BLOCK = 1024  # tokens a program


@triton.jit
def _mean(scores, stride_head, slots, candidates, HEADS: tl.constexpr):
    total = tl.load(scores + slots, mask=slots < candidates, other=0.0)
    for head in range(1, HEADS):
        total += tl.load(scores + head * stride_head + slots, mask=slots < candidates, other=0.0)
    return total / HEADS


@triton.jit(
    do_not_specialize=["stride_layer", "stride_request", "stride_head", "first_request", "requests"],
    do_not_specialize_on_alignment=["scores"],
)
def _layer_kernel(
    lengths,  # [R]
    scores,  # [layers, requests, H, slots] by its strides
    stride_layer,
    stride_request,
    stride_head,
    shared,  # [owners, capacity], of each layer's first head
    first_request,
    requests,
    capacity,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    candidates = tl.load(lengths + first_request + tl.program_id(1)) - WINDOW
    scores += tl.program_id(2).to(tl.int64) * stride_layer + tl.program_id(1).to(tl.int64) * stride_request
    owner = (tl.program_id(2) * requests + tl.program_id(1)) * HEADS  # the table of the layer's first head
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = _mean(scores, stride_head, slots, candidates, HEADS)
    tl.store(shared + owner.to(tl.int64) * capacity + slots, mean, mask=slots < candidates)


@triton.jit(
    do_not_specialize=["stride_layer", "stride_request", "stride_head", "first_request", "first", "layers"],
    do_not_specialize_on_alignment=["scores"],
)
def _global_kernel(
    lengths,  # [R]
    scores,  # [layers, requests, H, slots] by its strides
    stride_layer,
    stride_request,
    stride_head,
    shared,  # [requests, capacity]
    first_request,
    first,
    layers,
    capacity,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    candidates = tl.load(lengths + first_request + tl.program_id(1)) - WINDOW
    scores += tl.program_id(1).to(tl.int64) * stride_request
    shared += tl.program_id(1).to(tl.int64) * capacity
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(shared + slots, mask=(slots < candidates) & (first > 0), other=0.0)
    for _ in range(0, layers):
        total += _mean(scores, stride_head, slots, candidates, HEADS)
        scores += stride_layer
    tl.store(shared + slots, total, mask=slots < candidates)


def share_in_layer(work: WorkSlice, scores: torch.Tensor, *, window: int) -> torch.Tensor:
    """Mean of each layer's scores over its KV heads.

    Args:
        work: requests and layers.
        scores: float32 [layers, requests, H, >= longest - window] of the slice, last stride 1. They may lie
            in ``work.scores``.
        window: number of newest tokens, which have no score.

    Returns:
        float32 [layers, requests, H, capacity]: a view of ``work.scores`` that gives all heads of a layer
        the same entries.
    """
    heads = work.kv.num_heads
    _layer_kernel[(-(-work.longest // _BLOCK), work.requests, work.layers)](
        work.batch.lengths_on_device,
        scores,
        *scores.stride()[:3],
        work.scores,
        work.first_request,
        work.requests,
        work.capacity,
        WINDOW=window,
        HEADS=heads,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return work.scores_by_head[:, :, :1].expand(-1, -1, heads, -1)


def add_layers(work: WorkSlice, scores: torch.Tensor, *, window: int) -> None:
    """Add each layer's mean over its KV heads to ``work.shared``, which begins anew with the first layer.

    Args:
        work: requests and layers; the slices of a request come in the order of the layers.
        scores: as in ``share_in_layer``.
        window: number of newest tokens, which have no score.
    """
    _global_kernel[(-(-work.longest // _BLOCK), work.requests)](
        work.batch.lengths_on_device,
        scores,
        *scores.stride()[:3],
        work.shared,
        work.first_request,
        work.first_layer,
        work.layers,
        work.capacity,
        WINDOW=window,
        HEADS=work.kv.num_heads,
        BLOCK=_BLOCK,
        num_warps=4,
    )
