"""Runs the rounds of a step over all layers: score, select, move; or score, and drop whole pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rkv_vllm.decisions.messages import Compaction, PageCompaction, TokenCompaction
from rkv_vllm.execution.cpu.layer_cache import CpuLayerCache
from rkv_vllm.execution.query_window import CpuQueryWindow
from rkv_vllm.execution.stopwatch import CpuStopwatch
from rkv_vllm.kernels import naive, tiled
from rkv_vllm.kernels.page_eviction import choose_pages
from rkv_vllm.policies import Policy, ScoreInputs
from rkv_vllm.settings.config import WINDOW, PolicyName, RkvConfig


class CpuCompactor:
    """Layer by layer in torch: each layer's tokens are copied out, and the survivors written back."""

    def __init__(
        self,
        caches: Sequence[CpuLayerCache],
        queries: CpuQueryWindow,
        config: RkvConfig,
        policies: dict[PolicyName, Policy],
    ) -> None:
        self._caches = caches
        self._queries = queries
        self._scope = config.scope
        self._order = config.order
        self._policies = policies
        self.stopwatch = CpuStopwatch()

    def run(self, compactions: Sequence[TokenCompaction]) -> None:
        if compactions:
            with self.stopwatch.timed():
                self._run(compactions)

    def _run(self, compactions: Sequence[TokenCompaction]) -> None:
        for compaction in compactions:
            sources = torch.tensor(compaction.source_pages)
            targets = torch.tensor(compaction.target_pages)
            shared = self._shared_by_all(compaction, sources) if self._scope == "global" else None
            for layer, cache in enumerate(self._caches):
                keys, values = cache.read(sources, compaction.length)
                scores = self._scores(compaction, layer, cache.scale, keys) if shared is None else shared
                if self._scope == "layer":
                    scores = scores.mean(dim=0, keepdim=True)
                kept = self._survivors(compaction, scores.expand(keys.shape[0], -1))
                index = kept.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
                cache.write(targets, keys.gather(1, index), values.gather(1, index))

    def evict_pages(self, eviction: PageCompaction, pages: Sequence[int]) -> tuple[list[int], list[int]]:
        """Chooses the pages that leave: those of lowest score over all layers and KV heads.

        Args:
            eviction: how many, and by which policy.
            pages: ids of the request's pages, in order.

        Returns: ids of the pages that stay, and of those that leave, each in order.
        """
        page_size = self._caches[0].page_size
        # The window's pages are no candidates, and all others are full of candidate tokens: pages may be
        # compared by their sums as well as by their means.
        num_candidates = (eviction.length - WINDOW) // page_size
        sources, total = torch.tensor(pages), torch.zeros(num_candidates)
        for layer, cache in enumerate(self._caches):
            keys, _ = cache.read(sources, eviction.length)
            scores = self._scores(eviction, layer, cache.scale, keys)
            total += naive.page_scores(scores, page_size)[:num_candidates]
        stay, leave = choose_pages(total, (eviction.length - eviction.keep) // page_size)
        return [pages[i] for i in stay] + list(pages[num_candidates:]), [pages[i] for i in leave]

    def _shared_by_all(self, compaction: TokenCompaction, sources: torch.Tensor) -> torch.Tensor:
        """float32 [1, N - WINDOW]: the sum over the layers of the mean over their heads."""
        total = torch.zeros(1, compaction.length - WINDOW)
        for layer, cache in enumerate(self._caches):
            keys, _ = cache.read(sources, compaction.length)
            total += self._scores(compaction, layer, cache.scale, keys).mean(dim=0)
        return total

    def _survivors(self, compaction: TokenCompaction, scores: torch.Tensor) -> torch.Tensor:
        """int64 [H, keep]: slots that stay, in the server's order, the window last."""
        length = compaction.length
        chosen = tiled.select(scores, compaction.keep - WINDOW, self._order)
        window = torch.arange(length - WINDOW, length).expand(scores.shape[0], -1)
        return torch.cat((chosen, window), dim=1)

    def _scores(self, round_: Compaction, layer: int, scale: float, keys: torch.Tensor) -> torch.Tensor:
        """float32 [H, N - WINDOW]."""
        inputs = ScoreInputs(
            keys=keys,
            queries=self._queries.of(layer, round_.query_row) if round_.query_row >= 0 else None,
            scale=scale,
            layer=layer,
            logical_length=round_.logical_length,
            num_previous_survivors=round_.num_previous_survivors,
        )
        return self._policies[round_.policy].scores(inputs)
