"""Capture of the newest tokens' queries, layer by layer, on their way into attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.settings.config import WINDOW


class QueryWindow:
    """One ring of `WINDOW` queries per layer and row; the scheduler lends rows to requests.

    A token at logical position p is written at ring place p mod `WINDOW`: a row whose request computed at
    least `WINDOW` tokens since it was lent holds exactly the newest ones.

    Attributes:
        queries: [layers, rows, WINDOW, query heads, head size] in the model's dtype.
    """

    def __init__(self, layers: Sequence[Attention], num_rows: int, device: torch.device) -> None:
        first = layers[0]
        self.queries = torch.zeros(
            (len(layers), num_rows, WINDOW, first.num_heads, first.head_size),
            dtype=first.dtype,
            device=device,
        )
        for index, layer in enumerate(layers):
            _record_in(layer, self, index)

    def record(self, layer: int, query: torch.Tensor) -> None:
        """Called by each layer's attention with [tokens, query heads, head size]."""
        raise NotImplementedError


class CpuQueryWindow(QueryWindow):
    """Told before each step which tokens to record."""

    _tokens = torch.empty(0, dtype=torch.int64)
    _places = torch.empty(0, dtype=torch.int64)

    def begin_step(self, tokens: list[int], places: list[int]) -> None:
        """Says which tokens of the coming forward pass to record, and where.

        Args:
            tokens: indices into the batch's tokens.
            places: for each, `row * WINDOW + position % WINDOW`.
        """
        self._tokens = torch.tensor(tokens, dtype=torch.int64)
        self._places = torch.tensor(places, dtype=torch.int64)

    def record(self, layer: int, query: torch.Tensor) -> None:
        if self._tokens.numel():
            self.queries[layer].flatten(0, 1)[self._places] = query[self._tokens]

    def of(self, layer: int, row: int) -> torch.Tensor:
        """[query heads, WINDOW, head size] of one row, in ring order."""
        return self.queries[layer, row].transpose(0, 1)


def _record_in(layer: Attention, window: QueryWindow, index: int) -> None:
    """Makes a layer's attention implementation hand its queries over.

    vLLM calls `forward` by name, outside compiled code. Re-typing the instance, instead of wrapping it, keeps
    every isinstance check on the implementation true.
    """
    impl_class = type(layer.impl)

    def forward(impl: Any, attention: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        window.record(index, query)
        return impl_class.forward(impl, attention, query, *args, **kwargs)

    layer.impl.__class__ = type(f"Recording{impl_class.__name__}", (impl_class,), {"forward": forward})


def window_positions(first: int, count: int) -> range:
    """Logical positions to record of a step that computes `count` tokens from position `first` on."""
    return range(max(first, first + count - WINDOW), first + count)
