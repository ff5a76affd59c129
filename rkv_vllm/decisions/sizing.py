"""How many requests fit into a KV cache pool, with and without a budget (pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

from rkv_vllm.decisions.lengths import RequestLengths
from rkv_vllm.decisions.pages import num_pages


@dataclass(frozen=True)
class KvShape:
    """What one token leaves in the KV cache of one device.

    `layers` and `kv_heads` are those of one device: divided among pipeline and tensor parallel ranks. Where
    layers have pages of their own by kind, `layers` are those that share a page.
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
class WindowPages:
    """What a request holds for a group of layers with a window.

    Attributes:
        page_size: tokens in a page.
        most: pages while it decodes.
        most_in_prompt: pages while its prompt is computed.
    """

    page_size: int
    most: int
    most_in_prompt: int


@dataclass(frozen=True)
class PageKinds:
    """Which pages a request holds.

    Attributes:
        compacted: groups of layers that see the whole text; each has pages of its own.
        windows: the other groups.
    """

    compacted: int = 1
    windows: tuple[WindowPages, ...] = ()


@dataclass(frozen=True)
class Pool:
    """vLLM's block pool on one device: `pages` of `page_size` tokens, its null page included."""

    pages: int
    page_size: int
    kinds: PageKinds = PageKinds()

    @classmethod
    def of_bytes(
        cls, size_bytes: int, page_size: int, bytes_per_token: int, kinds: PageKinds = PageKinds()
    ) -> Pool:
        return cls(max(size_bytes, 0) // (page_size * bytes_per_token), page_size, kinds)

    @property
    def usable_pages(self) -> int:
        """Pages that requests can hold: vLLM keeps one back, to which unused table entries point."""
        return max(self.pages - 1, 0)

    def pages_for(self, slots: int, length: int | None = None) -> int:
        """Pages of a request that holds `slots` tokens in layers that see the whole text.

        Args:
            length: of its text so far; None: as many.
        """
        pages = num_pages(slots, self.page_size) * self.kinds.compacted
        text = slots if length is None else length
        return pages + sum(min(num_pages(text, each.page_size), each.most) for each in self.kinds.windows)

    def pages_to_start(self, slots: int, length: int) -> int:
        """Pages that vLLM wants of a pool for one request, a prompt of that length included."""
        pages = num_pages(slots, self.page_size) * self.kinds.compacted
        return pages + sum(
            min(num_pages(length, each.page_size) + 1, each.most_in_prompt) for each in self.kinds.windows
        )

    def requests_that_fit(self, slots: int, length: int | None = None) -> int:
        """Requests that can hold so much each at the same time, sharing no page."""
        return self.usable_pages // self.pages_for(slots, length)


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
