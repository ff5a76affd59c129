"""Runs the compactions of a step with the Triton kernels: all requests and layers of a policy together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rkv_vllm.config import POOL_KERNEL, SIMILARITY_THRESHOLD, WINDOW, PolicyName, RkvConfig
from rkv_vllm.kernels.paged import CompactionBatch, PagedKV
from rkv_vllm.kernels.pipeline import RkvRound
from rkv_vllm.plan import Compaction
from rkv_vllm.policies import Policy, ScoreInputs
from rkv_vllm.stopwatch import CudaStopwatch


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
        )
        self._scale = scale
        self._policies = policies
        self.stopwatch = CudaStopwatch()
        self._lambdas: dict[PolicyName, float] = {"rkv": config.mix_lambda, "snapkv": 1.0}

    def warm_up(self) -> None:
        """Compiles every kernel; page 0, which vLLM keeps as its null page, lends its slots."""
        self._round.warm_up(self._queries)

    def run(self, compactions: Sequence[Compaction]) -> None:
        if compactions:
            with self.stopwatch.lap():
                self._run(compactions)

    def _run(self, compactions: Sequence[Compaction]) -> None:
        by_attention = [c for c in compactions if c.policy in self._lambdas]
        if by_attention:
            weights = [self._lambdas[c.policy] for c in by_attention]
            lam = torch.tensor(weights, pin_memory=True).to(self._kv.device, non_blocking=True)
            self._round.run(self._queries, self._batch(by_attention), lam)
        for compaction in compactions:
            if compaction.policy not in self._lambdas:
                batch = self._batch([compaction])
                self._round.select_and_move(self._scores(compaction, batch), batch)

    def _batch(self, compactions: Sequence[Compaction]) -> CompactionBatch:
        return CompactionBatch.build(
            lengths=[c.length for c in compactions],
            keeps=[c.keep for c in compactions],
            source_pages=[c.source_pages for c in compactions],
            target_pages=[c.target_pages for c in compactions],
            query_rows=[max(c.query_row, 0) for c in compactions],
            page_size=self._kv.page_size,
            device=self._kv.device,
        )

    def _scores(self, compaction: Compaction, batch: CompactionBatch) -> torch.Tensor:
        """float32 [layers, 1, H, length - WINDOW]."""
        scores = []
        for index, layer in enumerate(self._kv.layers):
            pages = layer[batch.source_pages[0]]  # [pages, H, page size, 2 D], a copy
            tokens = pages.transpose(0, 1).flatten(1, 2)[:, : compaction.length]
            inputs = ScoreInputs(
                keys=tokens[..., : self._kv.head_size],
                queries=None,
                scale=self._scale,
                layer=index,
                logical_length=compaction.logical_length,
            )
            scores.append(self._policies[compaction.policy].scores(inputs))
        return torch.stack(scores).unsqueeze(1).contiguous()
