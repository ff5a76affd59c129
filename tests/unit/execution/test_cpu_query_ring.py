"""What the CPU's query ring captures, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rkv_vllm.execution.cpu.query_ring import CpuQueryRing
from rkv_vllm.settings.policy_table import RING_SIZE


class Attention:
    def forward(self) -> None:
        raise AssertionError("nothing is computed here")


def test_nothing_is_captured_between_steps() -> None:
    """Proves that a dummy batch after a step, shorter or longer than it, leaves the rows as they are."""
    layer: Any = SimpleNamespace(num_heads=3, head_size=4, dtype=torch.float32, impl=Attention())
    ring = CpuQueryRing([layer], 2, torch.device("cpu"), ranks_per_kv_head=1)
    ring.begin_step([1, 5], [2, RING_SIZE + 7])
    step = torch.randn(6, 3, 4)
    ring.capture(0, step)
    ring.end_step()
    assert torch.equal(ring.queries[0, 0, 2], step[1]) and torch.equal(ring.queries[0, 1, 7], step[5])
    before = ring.queries.clone()
    for tokens in (1, 8):
        ring.capture(0, torch.randn(tokens, 3, 4))
    assert torch.equal(ring.queries, before)
