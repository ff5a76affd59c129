"""What only a GPU can show of the kernels; `conftest.py` leaves this file out elsewhere."""

from __future__ import annotations

import pytest
import torch

from rkv_vllm.kernels.batch import CompactionBatch, QueryWindow
from rkv_vllm.kernels.cache_layout import FP8, PagedKV
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.options import Order, Scope
from rkv_vllm.kernels.rkv_scorer import RkvScorer


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FP8], ids=str)
@pytest.mark.parametrize("order", ["temporal", "score"])
@pytest.mark.parametrize("scope", ["head", "layer", "global"])
def test_no_slow_growth_and_no_waiting(scope: Scope, order: Order, dtype: torch.dtype) -> None:
    """Proves that rounds leave allocated memory as it was and never wait for the device."""
    layer = torch.randn(200, 2, 16, 128, device="cuda").to(dtype)
    queries = torch.randn(1, 2, 8, 4, 64, dtype=torch.bfloat16, device="cuda")
    kv = PagedKV([layer])
    rounds, factors = CompactionRound(kv, scope=scope), kv.equal_factors(0.125)
    scorer = RkvScorer(queries, factors, torch.tensor([0.1, 1.0], device="cuda"))
    rounds.warm_up([RkvScorer(queries, factors, torch.tensor([0.5], device="cuda"))], order)
    batch = CompactionBatch.build(
        lengths=[1152, 700],
        keeps=[1024, 600],
        source_pages=[list(range(72)), list(range(72, 116))],
        target_pages=[list(range(64)), list(range(72, 110))],
        page_size=16,
        device="cuda",
        queries=[QueryWindow(0, 1152, 8), QueryWindow(1, 700, 8)],
        order=order,
    )
    rounds.run(scorer, batch)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rounds.run(scorer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
