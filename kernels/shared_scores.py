"""One set of scores for all KV heads of a layer, or of all layers, in place of each head's own.

Heads and layers are added one after the other by the program that owns the tokens, so that the sums do not
depend on how a request was cut into parts, nor on what else is in the batch. Formula: rkv_spec 1.9;
reference: ``naive.shared_scores``.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .work_slice import Part

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
    lengths,
    scores,
    stride_layer,
    stride_request,
    stride_head,
    shared,
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
    lengths,
    scores,
    stride_layer,
    stride_request,
    stride_head,
    shared,
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


def share_in_layer(part: Part, scores: torch.Tensor, *, window: int) -> torch.Tensor:
    """Mean of each layer's scores over its KV heads.

    Args:
        part: requests and layers.
        scores: float32 [layers, requests, H, >= longest - window] of the part, last stride 1. They may lie in
            ``part.scores``.
        window: number of newest tokens, which have no score.

    Returns:
        float32 [layers, requests, H, capacity]: a view of ``part.scores`` that gives all heads of a layer
        the same entries.
    """
    heads = part.kv.num_heads
    _layer_kernel[(-(-part.longest // _BLOCK), part.requests, part.layers)](
        part.batch.lengths_on_device,
        scores,
        *scores.stride()[:3],
        part.scores,
        part.first_request,
        part.requests,
        part.capacity,
        WINDOW=window,
        HEADS=heads,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    tables = part.scores.view(part.layers, part.requests, heads, part.capacity)
    return tables[:, :, :1].expand(-1, -1, heads, -1)


def add_layers(part: Part, scores: torch.Tensor, *, window: int) -> None:
    """Add each layer's mean over its KV heads to ``part.shared``, which begins anew with the first layer.

    Args:
        part: requests and layers; the parts of a request come in the order of the layers.
        scores: as in ``share_in_layer``.
        window: number of newest tokens, which have no score.
    """
    _global_kernel[(-(-part.longest // _BLOCK), part.requests)](
        part.batch.lengths_on_device,
        scores,
        *scores.stride()[:3],
        part.shared,
        part.first_request,
        part.first_layer,
        part.layers,
        part.capacity,
        WINDOW=window,
        HEADS=part.kv.num_heads,
        BLOCK=_BLOCK,
        num_warps=4,
    )
