"""Runs the compactions of a step over all layers: score, select, move."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rkv_vllm.config import WINDOW, PolicyName
from rkv_vllm.cpu_cache import CpuLayerCache
from rkv_vllm.kernels import tiled
from rkv_vllm.plan import Compaction
from rkv_vllm.policies import Policy, ScoreInputs
from rkv_vllm.query_window import CpuQueryWindow
from rkv_vllm.stopwatch import CpuStopwatch


class CpuCompactor:
    """Layer by layer in torch: each layer's tokens are copied out, and the survivors written back."""

    def __init__(
        self,
        caches: Sequence[CpuLayerCache],
        queries: CpuQueryWindow,
        policies: dict[PolicyName, Policy],
    ) -> None:
        self._caches = caches
        self._queries = queries
        self._policies = policies
        self.stopwatch = CpuStopwatch()

    def run(self, compactions: Sequence[Compaction]) -> None:
        if compactions:
            with self.stopwatch.lap():
                self._run(compactions)

    def _run(self, compactions: Sequence[Compaction]) -> None:
        for compaction in compactions:
            sources = torch.tensor(compaction.source_pages)
            targets = torch.tensor(compaction.target_pages)
            for layer, cache in enumerate(self._caches):
                keys, values = cache.read(sources, compaction.length)
                kept = self._survivors(compaction, layer, cache.scale, keys)
                index = kept.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
                cache.write(targets, keys.gather(1, index), values.gather(1, index))

    def _survivors(
        self, compaction: Compaction, layer: int, scale: float, keys: torch.Tensor
    ) -> torch.Tensor:
        """int64 [H, keep]: slots that stay, ascending, the window last."""
        heads, length, _ = keys.shape
        inputs = ScoreInputs(
            keys=keys,
            queries=self._queries.of(layer, compaction.query_row) if compaction.query_row >= 0 else None,
            scale=scale,
            layer=layer,
            logical_length=compaction.logical_length,
        )
        scores = self._policies[compaction.policy].scores(inputs)
        chosen = tiled.select(scores, compaction.keep - WINDOW)
        window = torch.arange(length - WINDOW, length).expand(heads, -1)
        return torch.cat((chosen, window), dim=1)
