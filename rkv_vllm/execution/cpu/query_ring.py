"""The query ring on a CPU: told before each step which tokens to capture."""

from __future__ import annotations

import torch

from rkv_vllm.execution.kv_head_copies import whole_group
from rkv_vllm.execution.query_ring import QueryRing
from rkv_vllm.settings.policy_table import RING_SIZE


class CpuQueryRing(QueryRing):
    """Told before each step which tokens to capture."""

    _tokens = torch.empty(0, dtype=torch.int64)
    _ring_indices = torch.empty(0, dtype=torch.int64)

    def begin_step(self, tokens: list[int], ring_indices: list[int]) -> None:
        """Says which tokens of the coming forward pass to record, and where.

        Args:
            tokens: indices into the batch's tokens.
            ring_indices: for each, `row * RING_SIZE + position % RING_SIZE`.
        """
        self._tokens = torch.tensor(tokens, dtype=torch.int64)
        self._ring_indices = torch.tensor(ring_indices, dtype=torch.int64)

    def capture(self, layer: int, query: torch.Tensor) -> None:
        if self._tokens.numel():
            self.queries[layer].flatten(0, 1)[self._ring_indices] = query[self._tokens]

    def end_step(self) -> None:
        """Captures nothing of what else may run before the next step, such as a dummy batch."""
        self.begin_step([], [])

    def newest(self, layer: int, row: int, end: int, count: int) -> torch.Tensor:
        """[query heads of the layer's KV heads, count, head size]: the queries before position `end`."""
        positions = torch.arange(end - count, end) % RING_SIZE
        queries = self.queries[layer, row, positions].transpose(0, 1)
        return whole_group(queries, self.ranks_per_kv_head, dim=0)


def captured_positions(first: int, count: int) -> range:
    """Logical positions to capture of a step that computes `count` tokens from position `first` on."""
    return range(max(first, first + count - RING_SIZE), first + count)
