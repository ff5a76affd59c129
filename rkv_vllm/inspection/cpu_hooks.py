"""The CPU's compactors, which tell a recorder what they do."""

from __future__ import annotations

from typing import Any

import torch

from rkv_vllm.decisions.messages import Compaction, PageCompaction, TokenCompaction
from rkv_vllm.execution.cpu.compactor import CpuCompactor, CpuPageCompactor, CpuTables, CpuTokenCompactor
from rkv_vllm.host.retype import retype
from rkv_vllm.inspection.recorder import Recorder, slots_of_pages
from rkv_vllm.policies import ScoreInputs


class _Recording(CpuCompactor[Any]):
    recorder: Recorder

    def _inputs(self, compaction: Compaction, layer: int, keys: torch.Tensor) -> ScoreInputs:
        inputs = super()._inputs(compaction, layer, keys)
        self.recorder.explain(compaction, self.group.layers[layer], inputs)
        return inputs


class RecordingCpuTokens(_Recording, CpuTokenCompactor):
    """By token."""

    def _run(self, compaction: TokenCompaction, tables: CpuTables) -> None:
        self.recorder.begin(compaction, self.group)
        super()._run(compaction, tables)

    def _survivors(self, compaction: TokenCompaction, layer: int, scores: torch.Tensor) -> torch.Tensor:
        kept = super()._survivors(compaction, layer, scores)
        self.recorder.keep(compaction, self.group.layers[layer], kept)
        return kept


class RecordingCpuPages(_Recording, CpuPageCompactor):
    """By page."""

    def _run(self, compaction: PageCompaction, tables: CpuTables) -> None:
        self.recorder.begin(compaction, self.group)
        before = torch.tensor(tables.pages_of(compaction.request_id))
        super()._run(compaction, tables)
        after = torch.tensor(tables.pages_of(compaction.request_id))
        kept = slots_of_pages(before, after, self._caches[0].page_size, compaction.length)
        for layer in self.group.layers:
            self.recorder.keep_in_all_heads(compaction, layer, kept)


def record_rounds(compactor: CpuCompactor[Any], recorder: Recorder) -> None:
    """Has the recorder told of every round from now on."""
    tokens = isinstance(compactor, CpuTokenCompactor)
    retype(compactor, RecordingCpuTokens if tokens else RecordingCpuPages).recorder = recorder
