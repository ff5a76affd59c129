"""The part of a batch that one set of launches covers, and the scratch memory it works in."""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .cache_layout import CompactionBatch, PagedKV

LINK_SCALE = tl.constexpr(1 << 30)
"""Sums of similarities are kept as 64-bit integers in units of 2^-30, so that their order does not matter."""


@dataclass(frozen=True)
class Part:
    """Some requests and some layers of a batch, with their scratch memory.

    The per-token tables are flat and hold ``capacity`` entries for each (layer, request, KV head) of the
    part.

    Attributes:
        kv: the cache.
        batch: all requests of the round.
        first_layer: first layer of the part.
        layers: number of layers.
        first_request: first request of the part.
        requests: number of requests.
        longest: largest physical length among the requests, in tokens.
        capacity: entries a (layer, request, head) in the per-token tables; a multiple of 128.
        slots: int32 table: each key's newest match (-1: none), then its window attention (float32), then the
            kept slots.
        weights: float32 table: inverse norm of each key.
        links: int64 table: sum of a key's similarities in units of 1 / LINK_SCALE.
        scores: float32 table: joint scores.
        peaks: float32 [layers * requests * H * blocks * window]: largest logit of each window row in a block.
        totals: float32, as ``peaks``: sum of exponentials of each window row in a block.
        shared: float32 [requests * capacity]: scores that all layers share, the same memory in all parts of a
            request; empty where none are.
        directions: int64 [layers * requests * H * D]: sum of the normalised keys in units of 1 / LINK_SCALE.
        blocks: most blocks into which a kernel may split a request's tokens.
        staging: flat, in the cache's dtype: all of the scratch memory but ``shared`` and ``slots``, free once
            slots are selected.
    """

    kv: PagedKV
    batch: CompactionBatch
    first_layer: int
    layers: int
    first_request: int
    requests: int
    longest: int
    capacity: int
    slots: torch.Tensor
    weights: torch.Tensor
    links: torch.Tensor
    scores: torch.Tensor
    peaks: torch.Tensor
    totals: torch.Tensor
    shared: torch.Tensor
    directions: torch.Tensor
    blocks: int
    staging: torch.Tensor


@triton.jit
def offsets_in_pages(page, slots, stride_page, stride_slot, PAGE_SIZE: tl.constexpr):
    """Element offsets of token slots within one KV head of one layer, given the page of each."""
    slots = slots.to(tl.uint32)  # never negative; without a sign, division by the page size is a shift
    page_offset = page.to(tl.uint64) * tl.cast(stride_page, tl.uint32).to(tl.uint64)  # one wide product
    return page_offset.to(tl.int64) + (slots % PAGE_SIZE).to(tl.int32) * stride_slot


@triton.jit
def slot_offsets(pages, slots, inside, stride_page, stride_slot, PAGE_SIZE: tl.constexpr):
    """Element offsets of token slots within one KV head of one layer."""
    page = tl.load(pages + slots.to(tl.uint32) // PAGE_SIZE, mask=inside, other=0).to(tl.uint32)
    return offsets_in_pages(page, slots, stride_page, stride_slot, PAGE_SIZE)


@triton.jit
def load_rows(kv, offsets, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] keys at the offsets of their slots, all of which exist."""
    d = tl.arange(0, BLOCK_D)
    if BLOCK_D == HEAD_SIZE:
        return tl.load(kv + offsets[:, None] + d[None, :])
    return tl.load(kv + offsets[:, None] + d[None, :], mask=(d < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def inverse_norm(keys):
    """[tokens, D] -> float32 [tokens]: one over the Euclidean norm, with rkv_spec 1.4's epsilon."""
    wide = keys.to(tl.float32)
    return 1.0 / (tl.sqrt(tl.sum(wide * wide, axis=1)) + 1e-8)
