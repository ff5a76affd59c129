"""What makes logits of products of stored keys and captured queries, read from attention layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rkv_vllm.execution.logit_factors import LogitFactors

HEADS = 3
PER_HEAD = torch.tensor([0.5, 2.0, 3.0])


def layer(
    cache_dtype: str, keys: torch.Tensor, queries: torch.Tensor, *, quantises: bool, scale: float = 0.1
) -> Any:
    return SimpleNamespace(
        impl=SimpleNamespace(scale=scale),
        num_kv_heads=HEADS,
        kv_cache_dtype=cache_dtype,
        query_quant=object() if quantises else None,
        _k_scale=keys,
        _q_scale=queries,
    )


@pytest.mark.parametrize("cache_dtype", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("quantises", [False, True])
@pytest.mark.parametrize(
    ("keys", "queries"),
    [
        (torch.tensor(3.0), torch.tensor(0.2)),
        (torch.tensor([3.0]), torch.tensor([0.2])),
        (PER_HEAD, torch.tensor([0.2])),
        (PER_HEAD, PER_HEAD.flip(0)),
    ],
    ids=["number", "one", "by head", "both by head"],
)
def test_scales_count_where_something_is_stored_over_them(
    cache_dtype: str, quantises: bool, keys: torch.Tensor, queries: torch.Tensor
) -> None:
    """Proves one factor a layer and head: the layer's own, times keys' scales for FP8 alone, times queries'
    where attention is given them in FP8."""
    layers = [
        layer(cache_dtype, keys * (1 + n), queries, quantises=quantises, scale=0.1 + n) for n in range(2)
    ]
    expected = torch.tensor([[0.1], [1.1]]).expand(2, HEADS)
    if cache_dtype.startswith("fp8"):
        expected = expected * keys * torch.tensor([[1.0], [2.0]])
    if quantises:
        expected = expected * queries
    found = LogitFactors(layers, torch.device("cpu"))()
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, expected.contiguous())


def test_scales_are_read_for_each_round() -> None:
    """Proves that a weight update counts, whether it fills a layer's scale or puts another in its place."""
    one = layer("fp8", torch.tensor(1.0), torch.tensor(1.0), quantises=True)
    factors = LogitFactors([one], torch.device("cpu"))
    torch.testing.assert_close(factors(), torch.full((1, HEADS), 0.1))
    one._k_scale.fill_(4.0)
    one._q_scale = torch.tensor([0.5])
    torch.testing.assert_close(factors(), torch.full((1, HEADS), 0.2))
