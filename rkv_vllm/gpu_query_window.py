"""The query window on a GPU: what to record is in a buffer, so that captured graphs replay right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.kernels.record import record
from rkv_vllm.query_window import QueryWindow


class GpuQueryWindow(QueryWindow):
    """`places` [max tokens] int32 says for each token of the batch where its query goes, or -1."""

    def __init__(
        self, layers: Sequence[Attention], num_rows: int, max_num_tokens: int, device: torch.device
    ) -> None:
        super().__init__(layers, num_rows, device)
        self.places = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)

    def record(self, layer: int, query: torch.Tensor) -> None:
        record(query, self.places, self.queries[layer])
