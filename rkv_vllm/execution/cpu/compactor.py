"""Compactors for a CPU: layer by layer in torch, on copies of one layer's tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from rkv_vllm.decisions.messages import Compaction, PageCompaction, PageReport, TokenCompaction
from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.execution.compactor import Compactor, Round
from rkv_vllm.execution.cpu.layer_cache import CpuLayerCache
from rkv_vllm.execution.cpu.query_ring import CpuQueryRing
from rkv_vllm.execution.layer_groups import LayerGroup
from rkv_vllm.kernels import naive, tiled
from rkv_vllm.kernels.page_eviction import choose_pages
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import Policy, ScoreInputs
from rkv_vllm.settings.config import WINDOW, Granularity, PolicyName, RkvConfig


class CpuTables(Protocol):
    """The runner's block table of the group: lists of page ids on the host."""

    def pages_of(self, request_id: str) -> list[int]:
        """Ids of the request's pages, in order."""

    def replace_pages(self, request_id: str, pages: Sequence[int]) -> None:
        """Makes `pages` all that the request holds."""


class CpuCompactor(Compactor[Round, CpuTables, PageReport]):
    """What both granularities share: scores of one layer, timing, reports."""

    def __init__(
        self,
        caches: Sequence[CpuLayerCache],
        queries: CpuQueryRing,
        config: RkvConfig,
        policies: dict[PolicyName, Policy],
        pairs: RotaryPairs,
        group: LayerGroup,
    ) -> None:
        """
        Args:
            caches: each layer's of the group.
            queries: the query ring.
            config: the server's settings.
            policies: by name.
            pairs: how the model's rotary embedding pairs a head's dimensions.
            group: the layers, which share pages.
        """
        self._caches = caches
        self.group = group
        self._queries = queries
        self._scope = config.scope
        self._order = config.order
        self._policies = policies
        self._pairs = pairs
        self._evicted: list[PageReport] = []

    def warm_up(self) -> None:
        """See `Compactor.warm_up`: there is nothing to compile."""

    def run(self, rounds: Sequence[Round], tables: CpuTables) -> None:
        """See `Compactor.run`."""
        for compaction in rounds:
            self._run(compaction, tables)

    def take_evicted(self) -> list[PageReport]:
        """See `Compactor.take_evicted`."""
        evicted, self._evicted = self._evicted, []
        return evicted

    @abstractmethod
    def _run(self, compaction: Round, tables: CpuTables) -> None:
        """Runs one round."""

    def _scores(self, compaction: Compaction, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """float32 [H, N - WINDOW], of keys [H, N, D] as the layer's cache has them."""
        return self._policies[compaction.policy].scores(self._inputs(compaction, layer, keys))

    def _inputs(self, compaction: Compaction, layer: int, keys: torch.Tensor) -> ScoreInputs:
        cache = self._caches[layer]
        return ScoreInputs(
            keys=cache.numbers(keys),
            queries=self._newest_queries(compaction, layer),
            scale=cache.scale,
            layer=self.group.layers[layer],
            logical_length=compaction.logical_length,
            num_previous_survivors=compaction.num_previous_survivors,
            protected=compaction.protect,
            rotary_pairs=self._pairs,
        )

    def _newest_queries(self, compaction: Compaction, layer: int) -> torch.Tensor | None:
        count = compaction.num_queries
        if not count:
            return None
        return self._queries.newest(
            self.group.layers[layer], compaction.query_row, compaction.logical_length, count
        )


class CpuTokenCompactor(CpuCompactor[TokenCompaction]):
    """Copies each layer's tokens out, and writes the survivors back."""

    def _run(self, compaction: TokenCompaction, tables: CpuTables) -> None:
        target_pages = compaction.target_pages[self.group.place]
        sources = torch.tensor(compaction.source_pages[self.group.place])
        targets = torch.tensor(target_pages)
        shared = self._scores_of_all_layers(compaction, sources) if self._scope == "global" else None
        for layer, cache in enumerate(self._caches):
            keys, values = cache.read(sources, compaction.length)
            scores = self._scores(compaction, layer, keys) if shared is None else shared
            if self._scope == "layer":
                scores = scores.mean(dim=0, keepdim=True)
            kept = self._survivors(compaction, layer, scores.expand(keys.shape[0], -1))
            index = kept.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
            cache.write(targets, keys.gather(1, index), values.gather(1, index))
        tables.replace_pages(compaction.request_id, target_pages)

    def _scores_of_all_layers(self, compaction: TokenCompaction, sources: torch.Tensor) -> torch.Tensor:
        """float32 [1, N - WINDOW]: the sum over the layers of the mean over their heads."""
        total = torch.zeros(1, compaction.length - WINDOW)
        for layer, cache in enumerate(self._caches):
            keys, _ = cache.read(sources, compaction.length)
            total += self._scores(compaction, layer, keys).mean(dim=0)
        return total

    def _survivors(self, compaction: TokenCompaction, layer: int, scores: torch.Tensor) -> torch.Tensor:
        """int64 [H, keep]: slots that stay in a layer, in the server's order, the window last."""
        length = compaction.length
        scores = naive.protected(scores, compaction.protect)
        chosen = tiled.select(scores, compaction.keep - WINDOW, self._order)
        window = torch.arange(length - WINDOW, length).expand(scores.shape[0], -1)
        return torch.cat((chosen, window), dim=1)


class CpuPageCompactor(CpuCompactor[PageCompaction]):
    """Drops the pages of lowest score over all layers and KV heads; nothing is moved."""

    def _run(self, compaction: PageCompaction, tables: CpuTables) -> None:
        pages = tables.pages_of(compaction.request_id)
        page_size = self._caches[0].page_size
        # The window's pages are no candidates, and all others are full of candidate tokens: pages may be
        # compared by their sums as well as by their means.
        num_candidates = (compaction.length - WINDOW) // page_size
        sources, total = torch.tensor(pages), torch.zeros(num_candidates)
        for layer, cache in enumerate(self._caches):
            keys, _ = cache.read(sources, compaction.length)
            scores = self._scores(compaction, layer, keys)
            total += naive.page_scores(scores, page_size)[:num_candidates]
        drop = (compaction.length - compaction.keep) // page_size
        stay, leave = choose_pages(total, drop, num_pages(compaction.protect, page_size))
        tables.replace_pages(compaction.request_id, [pages[i] for i in stay] + pages[num_candidates:])
        evicted = tuple(pages[i] for i in leave)
        self._evicted.append(PageReport(compaction.request_id, compaction.eviction_id, evicted))


def make_cpu_compactor(
    caches: Sequence[CpuLayerCache],
    queries: CpuQueryRing,
    config: RkvConfig,
    policies: dict[PolicyName, Policy],
    pairs: RotaryPairs,
    group: LayerGroup,
) -> CpuCompactor[Any]:
    """The compactor for the server's granularity."""
    by_granularity: dict[Granularity, type[CpuCompactor[Any]]] = {
        "token": CpuTokenCompactor,
        "page": CpuPageCompactor,
    }
    return by_granularity[config.granularity](caches, queries, config, policies, pairs, group)
