"""How many requests fit into a KV cache pool, with and without a budget (pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.decisions.pages import num_pages


@dataclass(frozen=True)
class KvShape:
    """What one token leaves in the KV cache of one device.

    `layers` and `kv_heads` are those of one device: divided among pipeline and tensor parallel ranks.
    """

    layers: int
    kv_heads: int
    head_size: int
    element_bytes: int

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.element_bytes


@dataclass(frozen=True)
class Pool:
    """vLLM's block pool on one device: `pages` of `page_size` tokens, its null page included."""

    pages: int
    page_size: int

    @classmethod
    def of_bytes(cls, size_bytes: int, page_size: int, bytes_per_token: int) -> Pool:
        return cls(max(size_bytes, 0) // (page_size * bytes_per_token), page_size)

    @property
    def usable_pages(self) -> int:
        """Pages that requests can hold: vLLM keeps one back, to which unused table entries point."""
        return max(self.pages - 1, 0)

    def pages_for(self, tokens: int) -> int:
        return num_pages(tokens, self.page_size)

    def requests_that_fit(self, slots: int) -> int:
        """Requests that can hold `slots` tokens each at the same time, sharing no page."""
        return self.usable_pages // self.pages_for(slots)


def peak_slots(length: int, lengths: RequestLengths | None) -> int:
    """Slots that the pool has to have for a request, in tokens.

    By token that is budget + buffer: a compaction comes first in the step after they are full, and moves
    within the request's own pages. A prompt that is longer is held whole until decoding begins. A request
    that keeps its full cache until memory is short can be brought down to that.

    Args:
        length: tokens of the request when it ends, the prompt included.
        lengths: its counts when it is new; None: full cache.
    """
    return length if lengths is None else min(length, lengths.needed_slots)
