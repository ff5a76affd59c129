"""What Model Runner V2's adapter does about pages that leave, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from rkv_vllm.decisions.messages import PageCompaction, PageReport, reports_of
from rkv_vllm.execution.gpu import runner as runner_v2
from rkv_vllm.execution.gpu.runner import CompactingRunnerV2, ReportingOutput
from rkv_vllm.host.contract import CONTRACT_V2_RUNNER, contract_problems

EVICTIONS = [
    PageCompaction(
        request_id=name, length=70, keep=keep, evicted=evicted, policy="rkv", query_row=0, eviction_id=number
    )
    for number, (name, keep, evicted) in enumerate([("a", 38, 32), ("b", 54, 160)])
]


class Left:
    """Stands for `LeftPages`, whose copy needs a GPU."""

    def __init__(self, evictions: list[PageCompaction], left: list[torch.Tensor]) -> None:
        self.left = {eviction.request_id: ids.tolist() for eviction, ids in zip(evictions, left, strict=True)}

    def reports(self) -> list[PageReport]:
        return [PageReport(name, 7, tuple(ids)) for name, ids in self.left.items()]


class Pending(AsyncModelRunnerOutput):
    def get_output(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[5]])


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(runner_v2, "LeftPages", Left)
    table = torch.arange(40, dtype=torch.int32).view(4, 10)
    given: list[list[int]] = []

    def evict_pages(evictions: list[PageCompaction], rows: list[torch.Tensor]) -> list[torch.Tensor]:
        given.extend(row.tolist() for row in rows)
        for row in rows:
            row[0] = 99
        return [row[1 : 1 + (e.length - e.keep) // 16] for e, row in zip(evictions, rows, strict=True)]

    fake = SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={"a": 3, "b": 1}),
        block_tables=SimpleNamespace(
            block_tables=[SimpleNamespace(gpu=table)],
            block_sizes=[16],
            num_blocks=SimpleNamespace(np=np.full((1, 4), 5, dtype=np.int32)),
        ),
        _compactor=SimpleNamespace(evict_pages=evict_pages),
        _lengths=SimpleNamespace(evicted=SimpleNamespace(np=np.zeros(4, dtype=np.int32))),
        _left_pages=[],
        given=given,
    )
    CompactingRunnerV2._drop_pages(fake, EVICTIONS)  # type: ignore[arg-type]
    return fake


def test_vllm_is_what_the_adapter_was_written_against() -> None:
    """Proves that every method which the GPU adapter overrides or calls takes what it should."""
    assert contract_problems(CONTRACT_V2_RUNNER) == []


def test_rows_lengths_and_counts_are_those_of_the_request(runner: Any) -> None:
    """Proves that each request's own row is rewritten in place, and that new pages go behind what stays."""
    assert runner.given == [list(range(30, 40)), list(range(10, 20))]
    assert runner.block_tables.block_tables[0].gpu[:, 0].tolist() == [0, 99, 20, 99]
    assert runner.block_tables.num_blocks.np.tolist() == [[5, 4, 5, 3]]
    assert runner._lengths.evicted.np.tolist() == [0, 160, 0, 32]


@pytest.mark.parametrize("output", [Pending(), Pending().get_output()])
def test_reports_leave_with_the_next_output(runner: Any, output: Any) -> None:
    """Proves that a step whose tokens are still to be sampled keeps the reports, and that the next output,
    ready or not, takes them along once."""
    assert CompactingRunnerV2._report(runner, None) is None
    reporting = CompactingRunnerV2._report(runner, output)
    assert isinstance(reporting, ReportingOutput)
    received = reporting.get_output()
    assert received.sampled_token_ids == [[5]]
    assert reports_of(received) == (PageReport("a", 7, (31, 32)), PageReport("b", 7, (11,)))
    assert CompactingRunnerV2._report(runner, output) is output
