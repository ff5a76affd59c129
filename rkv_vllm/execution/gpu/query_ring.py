"""The query ring on a GPU: what to capture is in a buffer, so that captured graphs replay right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.execution.query_ring import QueryRing
from rkv_vllm.kernels.query_capture import capture


class GpuQueryRing(QueryRing):
    """Captures what `ring_indices` says, from inside a captured graph too.

    Attributes:
        ring_indices: int32 [max tokens], for each token of the batch where its query goes, or -1.
        active: whether the coming step captures anything at all; saves a launch a layer where attention runs
            outside a captured graph.
    """

    def __init__(
        self,
        layers: Sequence[Attention],
        num_rows: int,
        device: torch.device,
        ranks_per_kv_head: int,
        max_num_tokens: int,
    ) -> None:
        super().__init__(layers, num_rows, device, ranks_per_kv_head)
        self.ring_indices = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        self.active = False
        self._places = list(range(len(layers)))
        self._rings = list(self.queries)
        # Queries come in FP8 where attention multiplies them with an FP8 cache as they are.
        self._dtype = self.queries.dtype if layers[0].query_quant is None else torch.float8_e4m3fn

    def put_together(self, groups: Sequence[Sequence[int]]) -> None:
        """Has the rings of a group's layers lie one behind the other; before anything is captured.

        Args:
            groups: indices of their layers.
        """
        order = [layer for group in groups for layer in group]
        self._places = [order.index(layer) for layer in range(len(order))]
        self._rings = [self.queries[place] for place in self._places]

    def of_layers(self, layers: Sequence[int]) -> torch.Tensor:
        """The rings of a group's layers, [layers, rows, RING_SIZE, query heads, head size]."""
        first = self._places[layers[0]]
        return self.queries[first : first + len(layers)]

    def capture(self, layer: int, query: torch.Tensor) -> None:
        if self.active or torch.cuda.is_current_stream_capturing():
            capture(query, self.ring_indices, self._rings[layer])

    def warm_up(self) -> None:
        """Compiles the kernel, which must not happen while a graph is captured."""
        _, _, _, heads, size = self.queries.shape
        query = torch.zeros(1, heads, size, dtype=self._dtype, device=self.queries.device)
        capture(query, torch.full_like(self.ring_indices[:1], -1), self._rings[0])
