"""What only a GPU can show of the kernels; `conftest.py` leaves this file out elsewhere."""

from __future__ import annotations

import pytest
import torch

from rkv_vllm.kernels.batch import CompactionBatch
from rkv_vllm.kernels.cache_layout import PagedKV
from rkv_vllm.kernels.compaction_round import RkvRound
from rkv_vllm.kernels.options import Order, Scope


@pytest.mark.parametrize("order", ["temporal", "score"])
@pytest.mark.parametrize("scope", ["head", "layer", "global"])
def test_no_slow_growth_and_no_waiting(scope: Scope, order: Order) -> None:
    """Proves that rounds leave allocated memory as it was and never wait for the device."""
    layer = torch.randn(200, 2, 16, 128, dtype=torch.bfloat16, device="cuda")
    queries = torch.randn(1, 2, 8, 4, 64, dtype=torch.bfloat16, device="cuda")
    rounds = RkvRound(PagedKV([layer]), scope=scope)
    rounds.warm_up(queries, order)
    lam = torch.tensor([0.1, 1.0], device="cuda")
    batch = CompactionBatch.build(
        lengths=[1152, 700],
        keeps=[1024, 600],
        source_pages=[list(range(72)), list(range(72, 116))],
        target_pages=[list(range(64)), list(range(72, 110))],
        query_rows=[0, 1],
        page_size=16,
        device="cuda",
        order=order,
    )
    rounds.run(queries, batch, lam)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rounds.run(queries, batch, lam)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
