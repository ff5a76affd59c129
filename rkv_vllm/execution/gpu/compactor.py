"""Runs the compactions of a step with the Triton kernels: all requests and layers of a policy together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rkv_vllm.decisions.messages import Compaction, PageCompaction, TokenCompaction
from rkv_vllm.execution.stopwatch import CudaStopwatch
from rkv_vllm.kernels import naive
from rkv_vllm.kernels.cache_layout import CompactionBatch, PagedKV
from rkv_vllm.kernels.compaction_round import RkvRound
from rkv_vllm.kernels.page_eviction import choose_pages, drop_pages
from rkv_vllm.policies import Policy, ScoreInputs
from rkv_vllm.settings.config import POOL_KERNEL, SIMILARITY_THRESHOLD, WINDOW, PolicyName, RkvConfig


class GpuCompactor:
    """Only enqueues work on the current stream; the host never waits.

    Policies `rkv` and `snapkv` are scored by kernels that walk the pages. The others are small torch
    expressions over a copy of one layer's keys, and share the kernels that select and move.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        queries: torch.Tensor,
        scale: float,
        config: RkvConfig,
        policies: dict[PolicyName, Policy],
    ) -> None:
        """Takes the memory that all rounds work on.

        Args:
            layers: each layer's cache, [pages, H, page size, 2 D].
            queries: the query ring, [layers, rows, WINDOW, Hq, D].
            scale: factor on the model's attention logits.
            config: the server's settings.
            policies: by name.

        Raises: ValueError where the kernels cannot address the cache.
        """
        self._kv = PagedKV(list(layers))
        self._queries = queries
        self._round = RkvRound(
            self._kv,
            window=WINDOW,
            threshold=SIMILARITY_THRESHOLD,
            pool_kernel=POOL_KERNEL,
            scale=scale,
            scope=config.scope,
        )
        self._order = config.order
        self._scale = scale
        self._policies = policies
        self.stopwatch = CudaStopwatch()
        self._lambdas: dict[PolicyName, float] = {"rkv": config.mix_lambda, "snapkv": 1.0}

    def warm_up(self) -> None:
        """Compiles every kernel; page 0, which vLLM keeps as its null page, lends its slots."""
        self._round.warm_up(self._queries, self._order)

    def run(self, compactions: Sequence[TokenCompaction]) -> None:
        if compactions:
            with self.stopwatch.timed():
                self._run(compactions)

    def _run(self, compactions: Sequence[TokenCompaction]) -> None:
        by_attention = [c for c in compactions if c.policy in self._lambdas]
        if by_attention:
            self._round.run(self._queries, self._batch(by_attention), self._weights(by_attention))
        for compaction in compactions:
            if compaction.policy not in self._lambdas:
                batch = self._batch([compaction])
                self._round.select_and_move(self._scores(compaction, batch.source_pages[0]), batch)

    def evict_pages(
        self, evictions: Sequence[PageCompaction], rows: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Drops each request's pages of lowest score over all layers and KV heads from its block table.

        Args:
            evictions: how many pages of which requests.
            rows: for each, its row of the block table, int32 on the device; rewritten in place.

        Returns: for each, ids of the pages that left, int32 on the device, in order.
        """
        masses = self._page_masses(evictions, rows)
        left = []
        for eviction, row, mass in zip(evictions, rows, masses, strict=True):
            # The window's pages are no candidates, and all others are full of candidate tokens: pages may be
            # compared by their sums as well as by their means.
            num_candidates = (eviction.length - WINDOW) // self._kv.page_size
            num_pages = self._num_pages(eviction)
            drop = (eviction.length - eviction.keep) // self._kv.page_size
            stay, leave = choose_pages(mass[:num_candidates], drop)
            rest = torch.arange(num_candidates, num_pages, device=stay.device)
            left.append(drop_pages(row[:num_pages], leave, torch.cat((stay, rest))))
        return left

    def _page_masses(
        self, evictions: Sequence[PageCompaction], rows: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Score of each page, float32 [>= candidate pages]."""
        masses: dict[int, torch.Tensor] = {}
        by_attention = [i for i, eviction in enumerate(evictions) if eviction.policy in self._lambdas]
        if by_attention:
            chosen = [evictions[i] for i in by_attention]
            width = max(self._num_pages(eviction) for eviction in chosen)
            batch = CompactionBatch.to_score(
                lengths=[eviction.length for eviction in chosen],
                source_pages=torch.stack([rows[i][:width] for i in by_attention]),
                query_rows=[eviction.query_row for eviction in chosen],
            )
            lam = self._weights(chosen)
            important, redundant = self._round.page_scores(self._queries, batch, lam).unbind(-1)
            weight = lam.unsqueeze(1)
            masses.update(zip(by_attention, weight * important - (1.0 - weight) * redundant, strict=True))
        for index, eviction in enumerate(evictions):
            if index not in masses:
                scores = self._scores(eviction, rows[index][: self._num_pages(eviction)])
                masses[index] = naive.page_scores(scores.flatten(0, 2), self._kv.page_size)
        return [masses[index] for index in range(len(evictions))]

    def _num_pages(self, round_: Compaction) -> int:
        return -(-round_.length // self._kv.page_size)

    def _weights(self, rounds: Sequence[Compaction]) -> torch.Tensor:
        """float32 [R], each round's weight of importance."""
        weights = [self._lambdas[round_.policy] for round_ in rounds]
        pinned = torch.tensor(weights, pin_memory=self._kv.device.type == "cuda")
        return pinned.to(self._kv.device, non_blocking=True)

    def _batch(self, compactions: Sequence[TokenCompaction]) -> CompactionBatch:
        return CompactionBatch.build(
            lengths=[c.length for c in compactions],
            keeps=[c.keep for c in compactions],
            source_pages=[c.source_pages for c in compactions],
            target_pages=[c.target_pages for c in compactions],
            query_rows=[max(c.query_row, 0) for c in compactions],
            page_size=self._kv.page_size,
            device=self._kv.device,
            order=self._order,
        )

    def _scores(self, round_: Compaction, source_pages: torch.Tensor) -> torch.Tensor:
        """float32 [layers, 1, H, length - WINDOW]."""
        scores = []
        for index, layer in enumerate(self._kv.layers):
            pages = layer[source_pages]  # [pages, H, page size, 2 D], a copy
            tokens = pages.transpose(0, 1).flatten(1, 2)[:, : round_.length]
            inputs = ScoreInputs(
                keys=tokens[..., : self._kv.head_size],
                queries=None,
                scale=self._scale,
                layer=index,
                logical_length=round_.logical_length,
                num_previous_survivors=round_.num_previous_survivors,
            )
            scores.append(self._policies[round_.policy].scores(inputs))
        return torch.stack(scores).unsqueeze(1).contiguous()
