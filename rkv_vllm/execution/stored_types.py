"""The types of the numbers in vLLM's caches."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.attention import Attention

#: By vLLM's name; it keeps all of them as bytes.
FP8_TYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def typed_cache(layer: Attention) -> torch.Tensor:
    """A layer's cache, [pages, H, page size, 2 D], in the type of the numbers in it."""
    cache: torch.Tensor = layer.kv_cache
    return cache.view(FP8_TYPES.get(layer.kv_cache_dtype, cache.dtype))
