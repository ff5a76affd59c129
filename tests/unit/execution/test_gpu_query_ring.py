"""The query ring of a GPU where attention is given FP8 queries, in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rkv_vllm.execution.gpu import query_ring
from rkv_vllm.execution.gpu.query_ring import GpuQueryRing

HEADS, SIZE = 2, 16


class Attention:
    """Stands for an attention implementation of vLLM."""

    def forward(self, layer: Any, query: torch.Tensor) -> torch.Tensor:
        return query


@pytest.mark.parametrize("quantises", [False, True])
def test_queries_are_warmed_up_and_captured_as_attention_gets_them(
    quantises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that the kernel is compiled for the queries that will come, FP8 where the layer quantises them,
    and that the ring holds their numbers in the model's dtype."""
    layer: Any = SimpleNamespace(
        num_heads=HEADS,
        head_size=SIZE,
        dtype=torch.float32,
        impl=Attention(),
        query_quant=object() if quantises else None,
    )
    ring = GpuQueryRing([layer], 2, torch.device("cpu"), 1, max_num_tokens=4)
    capture, compiled_for = query_ring.capture, []
    monkeypatch.setattr(query_ring, "capture", lambda query, *rest: compiled_for.append(query.dtype))
    ring.warm_up()
    monkeypatch.setattr(query_ring, "capture", capture)

    query = torch.randn(3, HEADS, SIZE).to(torch.float8_e4m3fn if quantises else torch.float32)
    assert compiled_for == [query.dtype]
    ring.ring_indices[:3] = torch.tensor([17, -1, 2])
    ring.active = True
    assert layer.impl.forward(layer, query) is query
    assert ring.queries.dtype == torch.float32
    expected = torch.zeros(2 * ring.queries.shape[2], HEADS, SIZE)
    expected[17], expected[2] = query[0].float(), query[2].float()
    assert torch.equal(ring.queries[0].flatten(0, 1), expected)
