"""Rounds of the CPU's compactors over a cache in FP8, without the instructions that vLLM's operator needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.plain_cache import all_layers

from rkv_vllm.decisions.messages import PageCompaction, PageReport, TokenCompaction
from rkv_vllm.execution.cpu import layer_cache
from rkv_vllm.execution.cpu.compactor import make_cpu_compactor
from rkv_vllm.execution.cpu.layer_cache import CpuLayerCache
from rkv_vllm.execution.stored_types import FP8_TYPES
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import make_policies
from rkv_vllm.settings.config import Granularity, RkvConfig
from rkv_vllm.settings.policy_table import NUM_QUERIES, POLICY_NAMES

PAGES, HEADS, PAGE, SIZE, LAYERS = 9, 2, 16, 32, 2
LENGTH, KEY_SCALE = 7 * PAGE + 5, 0.02


def operator(keys: Any, values: Any, key_cache: Any, value_cache: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for vLLM's: keys of a page, then its values, in the order of their slots."""
    for cache, part in ((key_cache, keys), (value_cache, values)):
        numbers = cache.view(FP8_TYPES.get(kwargs["kv_cache_dtype"], cache.dtype))
        numbers.copy_(part.transpose(0, 1).reshape(numbers.shape))


def layer(cache: torch.Tensor, cache_dtype: str, scale: float) -> Any:
    return SimpleNamespace(
        kv_cache=cache,
        kv_cache_dtype=cache_dtype,
        isa="",
        dtype=torch.float32,
        head_size=SIZE,
        impl=SimpleNamespace(scale=scale),
        _k_scale_float=KEY_SCALE,
    )


class Tables:
    """The block table of one request."""

    def __init__(self) -> None:
        self.pages = [5, 2, 8, 0, 7, 1, 3, 6]

    def pages_of(self, request_id: str) -> list[int]:
        return list(self.pages)

    def replace_pages(self, request_id: str, pages: Any) -> None:
        self.pages = list(pages)


@pytest.mark.parametrize("granularity", ["token", "page"])
@pytest.mark.parametrize("cache_dtype", FP8_TYPES)
def test_rounds_over_bytes_are_rounds_over_numbers(
    cache_dtype: str, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves for every policy that an FP8 cache keeps the bytes whose numbers a plain cache keeps, where the
    scale of the keys is part of the logits."""
    monkeypatch.setattr(layer_cache.ops, "cpu_attn_reshape_and_cache", operator)
    generator = torch.Generator().manual_seed(2)
    config = RkvConfig(mix_lambda=0.3, granularity=granularity)
    ring = torch.randn(LAYERS, HEADS * 3, 16, SIZE, generator=generator)
    queries: Any = SimpleNamespace(newest=lambda layer, row, end, count: ring[layer, :, :count])
    for policy in POLICY_NAMES:
        keys_and_values = torch.randn(LAYERS, PAGES, HEADS, PAGE, 2 * SIZE, generator=generator)
        bytes_ = (keys_and_values / KEY_SCALE).to(FP8_TYPES[cache_dtype]).view(torch.uint8)
        numbers = bytes_.view(FP8_TYPES[cache_dtype]).float()
        found: list[tuple[Tables, list[PageReport], torch.Tensor]] = []
        for cache, name, scale in ((bytes_, cache_dtype, 0.2), (numbers, "auto", 0.2 * KEY_SCALE)):
            caches = [CpuLayerCache(layer(each, name, scale)) for each in cache]
            policies, pairs = make_policies(config), RotaryPairs(SIZE)
            compactor = make_cpu_compactor(caches, queries, config, policies, pairs, all_layers(LAYERS))
            tables = Tables()
            common: dict[str, Any] = {
                "request_id": "a",
                "length": LENGTH,
                "policy": policy,
                "query_row": 0,
                "num_queries": NUM_QUERIES[policy],
            }
            if granularity == "token":
                pages = tuple(tables.pages)
                compaction: Any = TokenCompaction(
                    **common, keep=50, evicted=LENGTH - 50, source_pages=(pages,), target_pages=(pages[3:7],)
                )
            else:
                compaction = PageCompaction(**common, keep=LENGTH - 3 * PAGE, evicted=3 * PAGE, eviction_id=4)
            compactor.run([compaction], tables)
            left = torch.cat([part for each in caches for part in each.read(torch.tensor(tables.pages), 50)])
            found.append((tables, compactor.take_evicted(), caches[0].numbers(left).float()))
        assert found[0][0].pages == found[1][0].pages
        assert found[0][1] == found[1][1]
        assert torch.equal(found[0][2], found[1][2]), policy
