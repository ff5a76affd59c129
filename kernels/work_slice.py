"""The slice of a batch that one set of launches covers, with the scratch memory it works in."""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .batch import CompactionBatch
from .cache_layout import PagedKV
from .decode import decoded

LINK_SCALE = tl.constexpr(1 << 30)
"""Sums of similarities are kept as 64-bit integers in units of 2^-30, so that their order does not matter."""


@dataclass(frozen=True)
class WorkSlice:
    """Some requests and some layers of a batch, with their scratch memory.

    An owner is one (layer, request, KV head) of the slice; there are ``owners`` of them. The per-token tables
    are flat and hold ``capacity`` entries for each. Some of them share memory, since a round fills and reads
    them one after the other: ``newest_match``, ``attention`` and ``kept``; ``inverse_norms``, ``redundancy``
    and ``chosen_slots``; ``links`` and ``span_records``; ``newest_match_of_block``, ``inverse_lengths`` and
    ``scores``.

    Attributes:
        kv: the cache.
        batch: all requests of the round.
        first_layer: first layer of the slice.
        layers: number of layers.
        first_request: first request of the slice.
        requests: number of requests.
        longest: largest physical length among the requests, in tokens.
        capacity: entries an owner has in the per-token tables; a multiple of 128.
        link_entries: entries of ``links``' memory an owner has; ``capacity``, or more where that is small.
        blocks: most blocks into which a kernel may split a request's tokens.
        kept: int32 table: slots that stay, in their order.
        inverse_norms: float32 table: one over each key's norm.
        links: int64 table: sum of a key's similarities in units of 1 / LINK_SCALE.
        scores: float32 table: joint scores.
        peaks: float32 [owners * blocks * window]: largest logit of each window row in a block.
        totals: float32, as ``peaks``: sum of exponentials of each window row in a block.
        directions: int64 [owners * D]: sum of the normalised keys in units of 1 / LINK_SCALE.
        shared: float32 [requests * capacity]: scores that all layers share, the same memory in all slices of
            a request; empty where none are.
        staging: flat, in the cache's dtype: all of the scratch memory but ``shared`` and ``kept``, free once
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
    link_entries: int
    blocks: int
    kept: torch.Tensor
    inverse_norms: torch.Tensor
    links: torch.Tensor
    scores: torch.Tensor
    peaks: torch.Tensor
    totals: torch.Tensor
    directions: torch.Tensor
    shared: torch.Tensor
    staging: torch.Tensor

    @property
    def newest_match(self) -> torch.Tensor:
        """int32 table: slot of each key's newest match; -1: none."""
        return self.kept

    @property
    def attention(self) -> torch.Tensor:
        """float32 table: attention of the window to each key, in place of ``newest_match``."""
        return self.kept.view(torch.float32)

    @property
    def redundancy(self) -> torch.Tensor:
        """float32 table: mean similarity of each key to all (rkv_spec 4.2)."""
        return self.inverse_norms

    @property
    def inverse_lengths(self) -> torch.Tensor:
        """float32 table: one over the length of each key's centred features (rkv_spec 4.2)."""
        return self.scores

    @property
    def span_records(self) -> torch.Tensor:
        """float32 [owners * 2 * link_entries]: see ``span_records``."""
        return self.links.view(torch.float32)

    @property
    def chosen_slots(self) -> torch.Tensor:
        """int32 table: slots that stay, before they are put in the order of their scores."""
        return self.inverse_norms.view(torch.int32)

    @property
    def newest_match_of_block(self) -> torch.Tensor:
        """int32 table: newest match of all keys of a block, one entry a block of the search."""
        return self.scores.view(torch.int32)

    @property
    def scores_by_head(self) -> torch.Tensor:
        """``scores`` as [layers, requests, H, capacity]."""
        return self.scores.view(self.layers, self.requests, self.kv.num_heads, self.capacity)

    # -- arguments of launches, in the order in which all kernels take them ---------------------------------

    def grid(self, blocks: int = 1) -> tuple[int, int, int]:
        """Programs: blocks of tokens, requests times KV heads, layers; ``locate`` reads it."""
        return (blocks, self.requests * self.kv.num_heads, self.layers)

    def cache_args(self) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
        """``kv, layer_offsets, stride_page, stride_kv_head, stride_slot``."""
        layer = self.kv.layers[0]
        return (layer, self.kv.layer_offsets, *layer.stride()[:3])

    def query_args(self, queries: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
        """``queries, stride_layer, stride_row, stride_query, stride_head, query_rows, query_ends``.

        Args:
            queries: [L, rows, ring, Hq, D], the query ring.
        """
        return (queries, *queries.stride()[:4], self.batch.query_rows, self.batch.query_ends)

    def token_args(self) -> tuple[torch.Tensor, int, torch.Tensor]:
        """``source_pages, stride_pages, lengths``."""
        batch = self.batch
        return (batch.source_pages, batch.source_pages.stride(0), batch.lengths_on_device)

    def record_args(self) -> tuple[torch.Tensor, int]:
        """``records, stride_owner``."""
        return (self.span_records, 2 * self.link_entries)

    def slice_args(self) -> tuple[int, int, int, int]:
        """``first_layer, first_request, requests, capacity``."""
        return (self.first_layer, self.first_request, self.requests, self.capacity)

    def shape_constants(self) -> dict[str, int]:
        """``HEADS, HEAD_SIZE, BLOCK_D, PAGE_SIZE``."""
        return {
            "HEADS": self.kv.num_heads,
            "HEAD_SIZE": self.kv.head_size,
            "BLOCK_D": triton.next_power_of_2(self.kv.head_size),
            "PAGE_SIZE": self.kv.page_size,
        }


@triton.jit
def locate(first_layer, first_request, requests, HEADS: tl.constexpr):
    """Layer, request of the batch, request of the slice, KV head and owner of a program on ``grid``."""
    head = tl.program_id(1) % HEADS
    local_request = tl.program_id(1) // HEADS
    owner = ((tl.program_id(2) * requests + local_request) * HEADS + head).to(tl.int64)
    return first_layer + tl.program_id(2), first_request + local_request, local_request, head, owner


@triton.jit
def layer_and_head(kv, layer_offsets, layer, head, stride_kv_head):
    """Where the rows of one KV head of one layer begin."""
    return kv + tl.multiple_of(tl.load(layer_offsets + layer), 16) + head.to(tl.int64) * stride_kv_head


@triton.jit
def scores_of(scores, stride_layer, stride_request, stride_head, local_request, head):
    """Where the scores of a program on ``grid`` begin."""
    scores += tl.program_id(2).to(tl.int64) * stride_layer
    return scores + local_request.to(tl.int64) * stride_request + head.to(tl.int64) * stride_head


@triton.jit
def queries_of(
    queries, stride_layer, stride_row, stride_head, query_rows, layer, request, head, GROUP: tl.constexpr
):
    """Where the row of the query ring that a request holds begins, for the query heads of one KV head."""
    row = tl.load(query_rows + request).to(tl.int64)
    return queries + layer.to(tl.int64) * stride_layer + row * stride_row + head * GROUP * stride_head


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
        return decoded(tl.load(kv + offsets[:, None] + d[None, :]))
    return decoded(tl.load(kv + offsets[:, None] + d[None, :], mask=(d < HEAD_SIZE)[None, :], other=0.0))


@triton.jit
def inverse_norm(keys):
    """[tokens, D] -> float32 [tokens]: one over the Euclidean norm, with rkv_spec 1.3's epsilon."""
    wide = keys.to(tl.float32)
    return 1.0 / (tl.sqrt(tl.sum(wide * wide, axis=1)) + 1e-8)
