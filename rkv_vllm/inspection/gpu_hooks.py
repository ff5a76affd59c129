"""The GPU's compactors, which tell a recorder what they do.

Kernels leave no parts of scores behind, so that those are explained before a round moves anything. What is
kept is read where the kernels have written it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rkv_vllm.decisions.messages import Compaction, PageCompaction, TokenCompaction
from rkv_vllm.execution.gpu.compactor import (
    GpuCompactor,
    GpuPageCompactor,
    GpuTables,
    GpuTokenCompactor,
)
from rkv_vllm.host.retype import retype
from rkv_vllm.inspection.recorder import Recorder, slots_of_pages
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.work_slice import WorkSlice
from rkv_vllm.settings.policy_table import RING_SIZE


class _Recording(GpuCompactor[Any]):
    recorder: Recorder

    def _begin(self, compaction: Compaction, pages: torch.Tensor) -> None:
        self.recorder.begin(compaction, self.group)
        if not self.recorder.explains:
            return
        factors = self._scorers.factors()  # [L, H]
        for layer in range(self._kv.num_layers):
            inputs = replace(
                self._inputs(compaction, pages, layer),
                queries=self._newest(compaction, layer, factors[layer]),
            )
            self.recorder.explain(compaction, self.group.layers[layer], inputs)

    def _newest(self, compaction: Compaction, layer: int, factors: torch.Tensor) -> torch.Tensor | None:
        """float32 [Hq, n, D], multiplied by what makes logits of them; None where the policy needs none."""
        if not compaction.num_queries:
            return None
        end = compaction.logical_length
        places = torch.arange(end - compaction.num_queries, end, device=self._kv.device) % RING_SIZE
        queries = self._queries[layer, compaction.query_row, places].transpose(0, 1).float()
        group = queries.shape[0] // factors.shape[0]
        return queries * factors.repeat_interleave(group)[:, None, None]


class RecordingGpuTokens(_Recording, GpuTokenCompactor):
    """By token."""

    def _run(self, rounds: Sequence[TokenCompaction], tables: GpuTables) -> None:
        for compaction in rounds:  # one request runs alone: there is one
            sources = compaction.source_pages[self.group.place]
            self._begin(compaction, torch.tensor(sources, device=self._kv.device))
            retype(self._round, RecordingRound).tell(self.recorder, compaction, self.group.layers)
            super()._run([compaction], tables)


class RecordingRound(CompactionRound):
    """Of one request at a time."""

    def tell(self, recorder: Recorder, compaction: TokenCompaction, layers: Sequence[int]) -> None:
        self._recorder, self._compaction, self._layers = recorder, compaction, layers

    def _select(self, work: WorkSlice, scores: torch.Tensor) -> None:
        super()._select(work, scores)
        compaction, heads = self._compaction, self.kv.num_heads
        chosen = work.kept.view(work.layers, heads, work.capacity)[
            ..., : compaction.keep - self.window
        ].long()
        window = torch.arange(compaction.length - self.window, compaction.length, device=chosen.device)
        for index in range(work.layers):
            kept = torch.cat((chosen[index], window.expand(heads, -1)), dim=1)
            self._recorder.keep(compaction, self._layers[work.first_layer + index], kept)


class RecordingGpuPages(_Recording, GpuPageCompactor):
    """By page."""

    def _run(self, rounds: Sequence[PageCompaction], tables: GpuTables) -> None:
        for compaction in rounds:
            row = tables.page_row(compaction.request_id)
            before = row[: self._num_pages(compaction.length)].clone()
            self._begin(compaction, before)
            super()._run([compaction], tables)
            after = row[: self._num_pages(compaction.keep)]
            kept = slots_of_pages(before, after, self._kv.page_size, compaction.length)
            for layer in self.group.layers:
                self.recorder.keep_in_all_heads(compaction, layer, kept)


def record_rounds(compactor: GpuCompactor[Any], recorder: Recorder) -> None:
    """Has the recorder told of every round from now on."""
    tokens = isinstance(compactor, GpuTokenCompactor)
    retype(compactor, RecordingGpuTokens if tokens else RecordingGpuPages).recorder = recorder
