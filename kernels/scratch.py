"""Scratch memory of a compaction round, allocated once, and how a batch is cut into slices that fit it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .batch import CompactionBatch
from .cache_layout import PagedKV
from .move import STAGED_COLUMNS
from .span_records import fewest_entries
from .work_slice import WorkSlice

_ROUNDING = 128  # per-token tables hold a multiple of this many tokens
_BLOCK = 32  # fewest tokens of which a kernel keeps a record
_KEPT_BYTES = 4
_TOKEN_BYTES = _KEPT_BYTES + 4 + 8 + 4  # kept, inverse norms, links, scores


class ScratchMemory:
    """One allocation on the cache's device, used anew by every slice."""

    def __init__(
        self, kv: PagedKV, *, window: int, shares_all_layers: bool, num_bytes: int, longest: int
    ) -> None:
        """
        Args:
            kv: the cache.
            window: newest tokens, whose queries give importance.
            shares_all_layers: whether all layers share scores, which then need memory of their own.
            num_bytes: size of the allocation, if one layer of the longest request does not need more.
            longest: physical length of the longest request, in tokens.
        """
        self._kv = kv
        self._window = window
        self._shares_all_layers = shares_all_layers
        num_bytes = max(num_bytes, self._bytes_of_one_layer(longest))
        self._memory = torch.empty(num_bytes // 64 * 64, dtype=torch.uint8, device=kv.device)

    @property
    def num_bytes(self) -> int:
        """Size of the allocation."""
        return self._memory.numel()

    def check(self, longest: int) -> None:
        """Raises: ValueError where it does not hold one layer of a request of ``longest`` tokens."""
        if self.num_bytes < self._bytes_of_one_layer(longest):
            raise ValueError(f"the scratch memory does not hold one layer of {longest} tokens")

    def slices(self, batch: CompactionBatch) -> Iterator[list[WorkSlice]]:
        """Slices that fit: some requests in one, or one request, that is too long, layer by layer in several.

        The slices of one list cover all layers of the same requests. Each overwrites what others have left,
        but for ``WorkSlice.shared``, which the slices of one list share.
        """
        layers, first = self._kv.num_layers, 0
        while first < batch.num_requests:
            longest, last = batch.lengths[first], first + 1
            while last < batch.num_requests:
                longer = max(longest, batch.lengths[last])
                if self._layers_that_fit(longer, last + 1 - first) < layers:
                    break
                longest, last = longer, last + 1
            step = min(layers, self._layers_that_fit(longest, last - first))
            yield [
                self._slice(batch, first_layer, min(step, layers - first_layer), first, last - first, longest)
                for first_layer in range(0, layers, step)
            ]
            first = last

    def _layers_that_fit(self, longest: int, requests: int) -> int:
        free = self.num_bytes - self._shared_bytes(longest, requests)
        return free // self._layer_bytes(longest, requests)

    def _bytes_of_one_layer(self, longest: int) -> int:
        """What one layer of one request needs, in whole tables; as much as ``num_bytes`` can be."""
        # Of each token's bytes in the tables, those of its kept slot are not free for staging.
        staged = longest * STAGED_COLUMNS * self._kv.dtype.itemsize
        staging = -(-staged // (_TOKEN_BYTES - _KEPT_BYTES)) * _TOKEN_BYTES
        needed = self._shared_bytes(longest, 1) + max(self._layer_bytes(longest, 1), staging)
        return -(-needed // 64) * 64

    def _layer_bytes(self, longest: int, requests: int) -> int:
        return requests * self._kv.num_heads * self._owner_bytes(longest) + 1024

    def _shared_bytes(self, longest: int, requests: int) -> int:
        return 4 * requests * _capacity(longest) if self._shares_all_layers else 0

    def _owner_bytes(self, longest: int) -> int:
        capacity = _capacity(longest)
        links = 8 * (self._link_entries(longest) - capacity)  # beyond those of the tokens
        statistics = capacity // _BLOCK * 8 * self._window
        return capacity * _TOKEN_BYTES + links + 8 * self._kv.head_size + statistics

    def _link_entries(self, longest: int) -> int:
        return max(_capacity(longest), fewest_entries(self._kv.head_size))

    def _slice(
        self,
        batch: CompactionBatch,
        first_layer: int,
        layers: int,
        first_request: int,
        requests: int,
        longest: int,
    ) -> WorkSlice:
        capacity = _capacity(longest)
        owners = layers * requests * self._kv.num_heads
        link_entries = self._link_entries(longest)
        blocks = capacity // _BLOCK
        position = 0

        def take(count: int, dtype: torch.dtype) -> torch.Tensor:
            nonlocal position
            start, position = position, position + -(-count * dtype.itemsize // 64) * 64
            return self._memory[start : start + count * dtype.itemsize].view(dtype)

        # First, and so at the same place in all slices of a request.
        shared = take(self._shared_bytes(longest, requests) // 4, torch.float32)
        kept = take(owners * capacity, torch.int32)
        staging = self._memory[position:].view(self._kv.dtype)
        return WorkSlice(
            kv=self._kv,
            batch=batch,
            first_layer=first_layer,
            layers=layers,
            first_request=first_request,
            requests=requests,
            longest=longest,
            capacity=capacity,
            link_entries=link_entries,
            blocks=blocks,
            kept=kept,
            inverse_norms=take(owners * capacity, torch.float32),
            links=take(owners * link_entries, torch.int64),
            scores=take(owners * capacity, torch.float32),
            peaks=take(owners * blocks * self._window, torch.float32),
            totals=take(owners * blocks * self._window, torch.float32),
            directions=take(owners * self._kv.head_size, torch.int64),
            shared=shared,
            staging=staging,
        )


def _capacity(longest: int) -> int:
    """Entries of a per-token table."""
    return -(-longest // _ROUNDING) * _ROUNDING
