"""Compactors for a GPU: with the Triton kernels, all requests and layers of a policy together.

They only enqueue work on the current stream; the host never waits. Policies that the kernels score walk the
pages there. The others are small torch expressions over one layer's keys, of which they are given a few pages
at a time, and share the kernels that select and move.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Protocol

import torch

from rkv_vllm.decisions.messages import Compaction, PageCompaction, TokenCompaction
from rkv_vllm.decisions.pages import num_pages
from rkv_vllm.execution.compactor import Compactor, Round
from rkv_vllm.execution.gpu.page_reports import EvictedPageIds
from rkv_vllm.execution.gpu.paged_keys import PagedKeys
from rkv_vllm.execution.gpu.scorers import KernelScorers, by_kernel
from rkv_vllm.execution.kv_head_copies import whole_group
from rkv_vllm.execution.layer_groups import LayerGroup
from rkv_vllm.kernels import naive
from rkv_vllm.kernels.batch import NO_QUERIES, CompactionBatch, QueryWindow
from rkv_vllm.kernels.cache_layout import PagedKV
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.page_eviction import choose_pages, drop_pages
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.kernels.scorer import GivenScores
from rkv_vllm.policies import Policy, ScoreInputs
from rkv_vllm.settings.config import WINDOW, Granularity, PolicyName, RkvConfig
from rkv_vllm.settings.policy_table import Kernel

#: Rounds whose queries are gathered at a time, which bounds the memory for them.
_ROUNDS_GATHERED = 4


class GpuTables(Protocol):
    """The runner's block table of the group, on the device, and how many of each row's entries count, on the
    host."""

    def page_row(self, request_id: str) -> torch.Tensor:
        """int32 [max pages], on the device: ids of the request's pages, and stale ones behind them."""

    def replace_pages(self, request_id: str, pages: Sequence[int]) -> None:
        """Makes `pages` all that the request holds."""

    def set_num_pages(self, request_id: str, pages: int) -> None:
        """Says how many entries of a row that was rewritten on the device count."""


class GpuCompactor(Compactor[Round, GpuTables, EvictedPageIds]):
    """What both granularities share: the cache, who scores which round, timing, what was evicted."""

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        queries: torch.Tensor,
        factors: Callable[[], torch.Tensor],
        config: RkvConfig,
        policies: dict[PolicyName, Policy],
        *,
        group: LayerGroup,
        pairs: RotaryPairs,
        longest: int,
        ranks_per_kv_head: int,
    ) -> None:
        """Takes the memory that all rounds work on.

        Args:
            layers: each layer's cache, [pages, H, page size, 2 D], in the type of the numbers in it.
            queries: the query ring of these layers, [layers, rows, RING_SIZE, Hq, D].
            factors: gives float32 [layers, H], what makes attention logits of products of queries and stored
                keys.
            config: the server's settings.
            policies: by name.
            group: the layers, which share pages.
            pairs: how the model's rotary embedding pairs a head's dimensions.
            longest: physical length of the longest request, in tokens.
            ranks_per_kv_head: ranks that hold the same KV head.

        Raises: ValueError where the kernels cannot address the cache.
        """
        self.group = group
        self._kv = PagedKV(list(layers))
        self._queries = queries
        self._ranks_per_kv_head = ranks_per_kv_head
        self._round = CompactionRound(self._kv, window=WINDOW, scope=config.scope, longest=longest)
        self._order = config.order
        self._policies = policies
        self._pairs = pairs
        self._scorers = KernelScorers(config, pairs, factors)
        self._evicted: list[EvictedPageIds] = []

    def warm_up(self) -> None:
        """Compiles every kernel; page 0, which vLLM keeps as its null page, lends its slots."""
        queries = self._of_whole_groups(self._queries[:, :1])
        self._round.warm_up(self._scorers.one_of_each(queries), self._order)

    def run(self, rounds: Sequence[Round], tables: GpuTables) -> None:
        """See `Compactor.run`."""
        self._run(rounds, tables)

    def take_evicted(self) -> list[EvictedPageIds]:
        """See `Compactor.take_evicted`."""
        evicted, self._evicted = self._evicted, []
        return evicted

    @abstractmethod
    def _run(self, rounds: Sequence[Round], tables: GpuTables) -> None:
        """Runs at least one round."""

    def _of_whole_groups(self, queries: torch.Tensor) -> torch.Tensor:
        """[layers, rows, RING_SIZE, Hq, D], Hq the query heads of this rank's KV heads, wherever they are."""
        return whole_group(queries, self._ranks_per_kv_head, dim=3)

    def _torch_scores(self, compaction: Compaction, source_pages: torch.Tensor, layer: int) -> torch.Tensor:
        """float32 [1, H, length - WINDOW], by the policy's own class."""
        inputs = self._inputs(compaction, source_pages, layer)
        return self._policies[compaction.policy].scores(inputs).unsqueeze(0)

    def _inputs(self, compaction: Compaction, source_pages: torch.Tensor, layer: int) -> ScoreInputs:
        """All but the queries."""
        return ScoreInputs(
            keys=PagedKeys(
                self._kv.layers[layer][..., : self._kv.head_size], source_pages, compaction.length
            ),
            queries=None,
            scale=1.0,  # of logits, which need queries
            layer=self.group.layers[layer],
            logical_length=compaction.logical_length,
            num_previous_survivors=compaction.num_previous_survivors,
            protected=compaction.protect,
            rotary_pairs=self._pairs,
        )


class GpuTokenCompactor(GpuCompactor[TokenCompaction]):
    """Scores, selects and moves the survivors of each layer and KV head."""

    def _run(self, rounds: Sequence[TokenCompaction], tables: GpuTables) -> None:
        for kernel, indices in by_kernel(rounds).items():
            some = [rounds[index] for index in indices]
            if kernel is None:
                self._run_in_torch(some)
            else:
                self._run_in_kernels(kernel, some)
        for compaction in rounds:
            tables.replace_pages(compaction.request_id, compaction.target_pages[self.group.place])

    def _run_in_torch(self, rounds: Sequence[TokenCompaction]) -> None:
        for compaction in rounds:
            batch = self._batch([compaction])
            scores = GivenScores(partial(self._torch_scores, compaction, batch.source_pages[0]))
            self._round.run(scores, batch)

    def _run_in_kernels(self, kernel: Kernel, rounds: Sequence[TokenCompaction]) -> None:
        if self._ranks_per_kv_head == 1:
            scorer = self._scorers.make(kernel, self._queries, [c.policy for c in rounds])
            self._round.run(scorer, self._batch(rounds))
            return
        for first in range(0, len(rounds), _ROUNDS_GATHERED):
            some = rounds[first : first + _ROUNDS_GATHERED]
            batch = self._batch(some)
            queries = self._of_whole_groups(self._queries[:, batch.query_rows])
            rows = torch.arange(len(some), dtype=torch.int32, device=self._kv.device)
            scorer = self._scorers.make(kernel, queries, [c.policy for c in some])
            self._round.run(scorer, replace(batch, query_rows=rows))

    def _batch(self, compactions: Sequence[TokenCompaction]) -> CompactionBatch:
        return CompactionBatch.build(
            lengths=[c.length for c in compactions],
            keeps=[c.keep for c in compactions],
            source_pages=[c.source_pages[self.group.place] for c in compactions],
            target_pages=[c.target_pages[self.group.place] for c in compactions],
            page_size=self._kv.page_size,
            device=self._kv.device,
            queries=[_queries_of(c) for c in compactions],
            order=self._order,
            protects=[c.protect for c in compactions],
        )


class GpuPageCompactor(GpuCompactor[PageCompaction]):
    """Drops the pages of lowest score over all layers and KV heads from the block table's rows."""

    def _run(self, rounds: Sequence[PageCompaction], tables: GpuTables) -> None:
        rows = [tables.page_row(round_.request_id) for round_ in rounds]
        evicted = []
        for compaction, row, scores in zip(rounds, rows, self._page_scores(rounds, rows), strict=True):
            # The window's pages are no candidates, and all others are full of candidate tokens: pages may be
            # compared by their sums as well as by their means.
            num_candidates = (compaction.length - WINDOW) // self._kv.page_size
            pages = self._num_pages(compaction.length)
            drop = (compaction.length - compaction.keep) // self._kv.page_size
            protected = self._num_pages(compaction.protect)
            stay, leave = choose_pages(scores[:num_candidates], drop, protected)
            rest = torch.arange(num_candidates, pages, device=stay.device)
            evicted.append(drop_pages(row[:pages], leave, torch.cat((stay, rest))))
            # How many pages stay follows from counts; vLLM appends this step's pages behind them.
            tables.set_num_pages(compaction.request_id, self._num_pages(compaction.keep))
        self._evicted.append(EvictedPageIds(rounds, evicted))

    def _page_scores(
        self, rounds: Sequence[PageCompaction], rows: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Score of each page, float32 [>= candidate pages], for each round.

        Args:
            rows: each round's row of the block table.
        """
        scores: dict[int, torch.Tensor] = {}
        for kernel, indices in by_kernel(rounds).items():
            if kernel is None:
                scores |= {index: self._torch_page_scores(rounds[index], rows[index]) for index in indices}
                continue
            some = [rounds[index] for index in indices]
            width = max(self._num_pages(compaction.length) for compaction in some)
            batch = CompactionBatch.to_score(
                lengths=[compaction.length for compaction in some],
                source_pages=torch.stack([rows[index][:width] for index in indices]),
                queries=[_queries_of(compaction) for compaction in some],
            )
            scorer = self._scorers.make(kernel, self._queries, [c.policy for c in some])
            scores |= zip(indices, self._round.page_scores(scorer, batch), strict=True)
        return [scores[index] for index in range(len(rounds))]

    def _torch_page_scores(self, compaction: PageCompaction, row: torch.Tensor) -> torch.Tensor:
        pages = row[: self._num_pages(compaction.length)]
        by_layer = (
            naive.page_scores(self._torch_scores(compaction, pages, layer)[0], self._kv.page_size)
            for layer in range(self._kv.num_layers)
        )
        return reduce(torch.add, by_layer)

    def _num_pages(self, slots: int) -> int:
        return num_pages(slots, self._kv.page_size)


def _queries_of(compaction: Compaction) -> QueryWindow:
    if not compaction.num_queries:
        return NO_QUERIES
    return QueryWindow(compaction.query_row, compaction.logical_length, compaction.num_queries)


def make_gpu_compactor(
    layers: Sequence[torch.Tensor],
    queries: torch.Tensor,
    factors: Callable[[], torch.Tensor],
    config: RkvConfig,
    policies: dict[PolicyName, Policy],
    *,
    group: LayerGroup,
    pairs: RotaryPairs,
    longest: int,
    ranks_per_kv_head: int,
) -> GpuCompactor[Any]:
    """The compactor for the server's granularity; arguments and errors as of `GpuCompactor`."""
    by_granularity: dict[Granularity, type[GpuCompactor[Any]]] = {
        "token": GpuTokenCompactor,
        "page": GpuPageCompactor,
    }
    return by_granularity[config.granularity](
        layers,
        queries,
        factors,
        config,
        policies,
        group=group,
        pairs=pairs,
        longest=longest,
        ranks_per_kv_head=ranks_per_kv_head,
    )
