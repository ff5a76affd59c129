"""Capture of the newest tokens' queries, layer by layer, on their way into attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.host.retype import override
from rkv_vllm.settings.policy_table import RING_SIZE


class QueryRing:
    """One ring of `RING_SIZE` queries per layer and row; the scheduler lends rows to requests.

    A token at logical position p is written at index p mod `RING_SIZE` of its ring: of the tokens that a
    request computed since its row was lent, the newest `RING_SIZE` are there.

    Attributes:
        queries: [layers, rows, RING_SIZE, query heads, head size] in the model's dtype, which holds queries
            that attention is given in FP8 as they are. Layers are those that are compacted.
        ranks_per_kv_head: ranks that hold the same KV head, and other query heads of its group.
    """

    def __init__(
        self, layers: Sequence[Attention], num_rows: int, device: torch.device, ranks_per_kv_head: int
    ) -> None:
        self.ranks_per_kv_head = ranks_per_kv_head
        first = layers[0]
        self.queries = torch.zeros(
            (len(layers), num_rows, RING_SIZE, first.num_heads, first.head_size),
            dtype=first.dtype,
            device=device,
        )
        for index, layer in enumerate(layers):
            _hook_attention(layer, self, index)

    def capture(self, layer: int, query: torch.Tensor) -> None:
        """Called by each layer's attention with [tokens, query heads, head size]."""
        raise NotImplementedError


def _hook_attention(layer: Attention, ring: QueryRing, index: int) -> None:
    """Makes a layer's attention implementation hand its queries over.

    vLLM calls `forward` by name, outside compiled code.
    """
    impl_class = type(layer.impl)

    def forward(impl: Any, attention: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ring.capture(index, query)
        return impl_class.forward(impl, attention, query, *args, **kwargs)

    override(layer.impl, "Capturing", forward=forward)
