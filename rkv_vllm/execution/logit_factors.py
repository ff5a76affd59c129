"""What makes attention logits of products of queries and cached keys, both as attention has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.execution.stored_types import FP8_TYPES


class LogitFactors:
    """One factor a layer and KV head: the model's attention scale, times the scales of what is stored in FP8.

    A checkpoint's scales of keys count for an FP8 cache alone, and those of queries where attention is given
    FP8 queries. A weight update may change or replace them, so that they are read anew for each round.
    """

    def __init__(self, layers: Sequence[Attention], device: torch.device) -> None:
        first = layers[0]
        scales = torch.tensor([[layer.impl.scale] for layer in layers], dtype=torch.float32)
        self._plain = scales.to(device).repeat(1, first.num_kv_heads)
        self._with_key_scale = layers if first.kv_cache_dtype in FP8_TYPES else ()
        self._with_query_scale = layers if first.query_quant is not None else ()

    def __call__(self) -> torch.Tensor:
        """float32 [L, H], contiguous, on the device; only enqueues work."""
        factors = self._plain
        if self._with_key_scale:
            factors = factors * _by_head([layer._k_scale for layer in self._with_key_scale])
        if self._with_query_scale:
            factors = factors * _by_head([layer._q_scale for layer in self._with_query_scale])
        return factors


def _by_head(scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scales of layers, each one number or one a KV head: [L, 1] or [L, H]."""
    return torch.stack(list(scales)).view(len(scales), -1)
