"""Spans of a request's tokens, a program each, and the records that policy ``invariant`` keeps of them.

What a walk sums over all keys it leaves span by span; the next one adds the records up in their order, and
nothing is added atomically. Where spans begin follows from the request's length alone, so that equal caches
get equal scores whatever is scored beside them. A record holds

* of each query, the logarithm of the sum of its exponentials,
* the sum of the keys' features,
* the sum of their directions (rkv_spec 4.2).
"""

# Triton reads its kernels' arguments without types.
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import triton
import triton.language as tl

from .cache_layout import PagedKV
from .rotary_pairs import RotaryPairs

if TYPE_CHECKING:
    from .work_slice import WorkSlice

_MOST_SPANS = tl.constexpr(16)  # of a request: as many records a program adds up
_UNIT = tl.constexpr(128)  # spans are a multiple of this many tokens
_SHORTEST_SPAN = 1024  # tokens
_MOST_ROWS = 128  # queries in one product

LOG2_E = tl.constexpr(1.4426950408889634)
"""Exponentials are those of two."""


@dataclass(frozen=True)
class KeyTiles:
    """Launch shape of a walk.

    Attributes:
        tokens: keys at a time.
        warps: warps a program.
        stages: depth of the pipeline of loads.
    """

    tokens: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """Keyword arguments of a kernel."""
        return {"BLOCK": self.tokens, "num_warps": self.warps, "num_stages": self.stages}


def key_tiles(kv: PagedKV) -> KeyTiles:
    """Launch shape of each walk: measured on an H100 for 16-bit keys of 128, else by what fits."""
    if kv.dtype.itemsize <= 2 and kv.head_size <= 128:
        return KeyTiles(tokens=64, warps=4, stages=2)
    return KeyTiles(tokens=32, warps=4, stages=2)


@dataclass(frozen=True)
class SpanRecords:
    """The shape of a cache's records.

    Attributes:
        ring: queries of a head in the ring.
        group: query heads of a KV head.
        rows: queries in one product.
        parts: products that all queries of a KV head take; of the records of one there is memory at a time.
        features: numbers of a key, padded.
    """

    ring: int
    group: int
    rows: int
    parts: int
    features: int

    @classmethod
    def of(cls, kv: PagedKV, queries: torch.Tensor, pairs: RotaryPairs) -> Self:
        """For a query ring [L, rows, ring, Hq, D]."""
        ring, group = queries.shape[2], queries.shape[3] // kv.num_heads
        # Of 16-bit numbers, fewer than 64 rows in a product take longer on a Hopper GPU than 64.
        fewest = 64 if queries.dtype.itemsize == 2 else 16
        rows = min(max(triton.next_power_of_2(ring * group), fewest), _MOST_ROWS)
        features = max(triton.next_power_of_2(pairs.num_features(kv.head_size)), 16)
        return cls(ring, group, rows, -(-ring * group // rows), features)

    @property
    def size(self) -> int:
        """Numbers of a record."""
        return self.rows + 2 * self.features

    @property
    def shortest_span(self) -> int:
        """Tokens; so many that all records of a request fit into its part of the memory."""
        return max(_SHORTEST_SPAN, triton.next_power_of_2(self.size))

    def grid(self, work: WorkSlice) -> tuple[int, int, int]:
        """A program for each span of each owner."""
        return work.grid(min(-(-work.longest // self.shortest_span), _MOST_SPANS.value))

    def constants(self, kv: PagedKV, pairs: RotaryPairs, window: int) -> dict[str, int]:
        """Those of all walks."""
        return {
            "HEADS": kv.num_heads,
            "WINDOW": window,
            "HEAD_SIZE": kv.head_size,
            "ROTATED": pairs.rotated,
            "INTERLEAVED": pairs.interleaved,
            "FEATURES_PAD": self.features,
            "PAGE_SIZE": kv.page_size,
            "ROWS": self.rows,
            "RECORD": self.size,
            "SHORTEST": self.shortest_span,
        }

    def query_constants(self) -> dict[str, int]:
        """Those of the walks that look at queries."""
        return {"RING": self.ring, "GROUP": self.group}


def fewest_entries(head_size: int) -> int:
    """int64 numbers that the largest record takes: keys have no more features than dimensions."""
    return _MOST_ROWS // 2 + max(triton.next_power_of_2(head_size), 16)


@triton.jit
def span_of(length, SHORTEST: tl.constexpr):
    """First token, one past the last one of this program's span, and how many spans the request has."""
    wanted = tl.minimum(tl.cdiv(length, SHORTEST), _MOST_SPANS)
    size = tl.cdiv(tl.cdiv(length, wanted), _UNIT) * _UNIT
    first = tl.program_id(0) * size
    return first, tl.minimum(first + size, length), tl.cdiv(length, size)


@triton.jit
def sum_of_records(records, spans, RECORD: tl.constexpr, FEATURES_PAD: tl.constexpr):
    """float32 [FEATURES_PAD]: what all spans have left at this place."""
    feature = tl.arange(0, FEATURES_PAD)
    total = tl.zeros((FEATURES_PAD,), tl.float32)
    for span in range(0, spans):
        total += tl.load(records + span * RECORD + feature)
    return total
