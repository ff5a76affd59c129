"""Lone keys: those without a match in a round. Among what survives with them they have none in the next.

The next round has to compare such a key with those alone that came since: a fraction of the search, where
few keys are alike. Whether a survivor is lone is kept beside the cache, by page: one bit for each slot, layer
and KV head. A request's first round takes nothing from there, so that a page may change hands.
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .compact import source_slots
from .paged import PagedKV
from .part import Part

_TOKENS = 1024  # tokens a step


def no_lone_keys(kv: PagedKV) -> torch.Tensor:
    """uint8 [pages, L, H, page size / 8], all zero: bit ``slot % 8`` of a page's byte ``slot // 8``."""
    shape = (kv.num_pages, kv.num_layers, kv.num_heads, kv.page_size // 8)
    return torch.zeros(shape, dtype=torch.uint8, device=kv.device)


@triton.jit
def is_lone(bits, stride_bits, pages, slots, survivors, PAGE_SIZE: tl.constexpr):
    """Whether a slot's key was lone in the round before; of what came since, no.

    ``bits`` points to the layer's and head's first byte in page 0.
    """
    known = slots < survivors
    page = tl.load(pages + slots // PAGE_SIZE, mask=known, other=0).to(tl.int64)
    byte = tl.load(bits + page * stride_bits + slots % PAGE_SIZE // 8, mask=known, other=0)
    return ((byte.to(tl.int32) >> (slots % 8)) & 1) > 0


@triton.jit(do_not_specialize=["stride_bits", "stride_target", "first_layer", "first_request", "requests"])
def _remember_kernel(
    bits,
    stride_bits,
    target_pages,
    stride_target,
    lengths,
    keeps,
    lone,
    kept,
    first_layer,
    first_request,
    requests,
    capacity,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0)
    request = first_request + tl.program_id(1)
    owner = (tl.program_id(2) * requests + tl.program_id(1)) * HEADS + head
    lone += owner.to(tl.int64) * capacity
    kept += owner.to(tl.int64) * capacity
    bits += ((first_layer + tl.program_id(2)) * HEADS + head) * (PAGE_SIZE // 8)
    target_pages += request * stride_target
    length = tl.load(lengths + request)
    keep = tl.load(keeps + request)
    bit = tl.arange(0, 8)
    for start in range(0, keep, TOKENS):
        first = start + tl.arange(0, TOKENS // 8) * 8  # of the eight tokens of a byte
        tokens = first[:, None] + bit[None, :]
        inside = tokens < keep
        slots = source_slots(kept, tokens, keep, length, WINDOW)
        is_set = tl.load(lone + slots, mask=inside, other=0).to(tl.int32)
        byte = tl.sum(is_set << bit[None, :], axis=1)
        page = tl.load(target_pages + first // PAGE_SIZE, mask=first < keep, other=0).to(tl.int64)
        place = page * stride_bits + first % PAGE_SIZE // 8
        tl.store(bits + place, byte.to(tl.uint8), mask=first < keep)


def remember(part: Part, bits: torch.Tensor, *, window: int) -> None:
    """Write which survivors were lone in this round, for the slots in which the target pages will hold them.

    Args:
        part: requests and layers, after ``select``.
        bits: as ``no_lone_keys`` makes it.
        window: number of newest tokens, which are kept without a score.
    """
    kv, batch = part.kv, part.batch
    _remember_kernel[(kv.num_heads, part.requests, part.layers)](
        bits,
        bits.stride(0),
        batch.target_pages,
        batch.target_pages.stride(0),
        batch.lengths_on_device,
        batch.keeps_on_device,
        part.lone,
        part.slots,
        part.first_layer,
        part.first_request,
        part.requests,
        part.capacity,
        HEADS=kv.num_heads,
        WINDOW=window,
        PAGE_SIZE=kv.page_size,
        TOKENS=_TOKENS,
        num_warps=4,
    )
