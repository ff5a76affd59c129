"""What Model Runner V2's adapter does about pages that leave, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from rkv_vllm.decisions.messages import PageCompaction, PageReport, reports_of
from rkv_vllm.execution.gpu.group_table import GpuGroupTable
from rkv_vllm.execution.gpu.page_reports import EvictedPageIds, ReportingOutput
from rkv_vllm.execution.gpu.runner import CompactingRunnerV2
from rkv_vllm.host.contract import CONTRACT_V2_RUNNER, contract_problems

ROUNDS = [
    PageCompaction(
        request_id=name, length=70, keep=keep, evicted=evicted, policy="rkv", query_row=0, eviction_id=number
    )
    for number, (name, keep, evicted) in enumerate([("a", 38, 32), ("b", 54, 160)])
]


class Pending(AsyncModelRunnerOutput):
    def get_output(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(
            req_ids=["a"],
            req_id_to_index={"a": 0},
            sampled_token_ids=[[5]],
            kv_connector_output=KVConnectorOutput(),
        )

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        return KVConnectorOutput()


class Evicting:
    """Stands for a compactor that has evicted pages of two requests."""

    def __init__(self) -> None:
        self._evicted = [EvictedPageIds(ROUNDS, [torch.tensor([31, 32]), torch.tensor([11])])]

    def take_evicted(self) -> list[EvictedPageIds]:
        evicted, self._evicted = self._evicted, []
        return evicted


@pytest.fixture
def runner() -> Any:
    """What the adapter's methods about outputs look at."""
    return SimpleNamespace(_compactors=Evicting())


@dataclass
class StagedTable:
    """vLLM's block table of a group in small, which is told what to write."""

    gpu: torch.Tensor
    written: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)

    def stage_write(self, index: int, start: int, x: tuple[int, ...]) -> None:
        self.written.append((index, start, x))


@pytest.fixture
def block_tables() -> Any:
    """vLLM's, of two groups: each has requests in slots 3 and 1."""
    numbers = torch.arange(40, dtype=torch.int32).view(4, 10)
    return SimpleNamespace(
        block_tables=[StagedTable(numbers.clone()), StagedTable(numbers.clone())],
        num_blocks=SimpleNamespace(np=np.full((2, 4), 5, dtype=np.int32)),
    )


@pytest.fixture
def table(block_tables: Any) -> GpuGroupTable:
    """That of the second group."""
    return GpuGroupTable(block_tables, {"a": 3, "b": 1}, group_id=1)


def test_vllm_is_what_the_adapter_was_written_against() -> None:
    """Proves that every method which the GPU adapter overrides or calls takes what it should."""
    assert contract_problems(CONTRACT_V2_RUNNER) == []


def test_a_row_is_rewritten_in_place(table: GpuGroupTable, block_tables: Any) -> None:
    """Proves that the row of a request is a view of its own entries of the group's table on the device."""
    table.page_row("b")[0] = 99
    assert [each.gpu[:, 0].tolist() for each in block_tables.block_tables] == [
        [0, 10, 20, 30],
        [0, 99, 20, 30],
    ]


def test_new_pages_go_behind_what_stays(table: GpuGroupTable, block_tables: Any) -> None:
    """Proves that the count of the request's own row in its group alone is set."""
    table.set_num_pages("a", 3)
    table.set_num_pages("b", 4)
    assert block_tables.num_blocks.np.tolist() == [[5, 5, 5, 5], [5, 4, 5, 3]]


def test_named_pages_replace_all_that_the_request_had(table: GpuGroupTable, block_tables: Any) -> None:
    """Proves that pages which the scheduler names overwrite the request's own row in its group, and that no
    other group loses its pages by it."""
    table.replace_pages("a", (7, 8))
    assert [each.written for each in block_tables.block_tables] == [[], [(3, 0, (7, 8))]]
    assert block_tables.num_blocks.np.tolist() == [[5, 5, 5, 5], [5, 5, 5, 2]]


@pytest.mark.parametrize("output", [Pending(), Pending().get_output()])
def test_reports_leave_with_the_next_output(runner: Any, output: Any) -> None:
    """Proves that a step whose tokens are still to be sampled keeps the reports, and that the next output,
    ready or not, takes them along once, and keeps what else vLLM asks of it."""
    assert CompactingRunnerV2._report(runner, None) is None
    reporting = CompactingRunnerV2._report(runner, output)
    assert isinstance(reporting, ReportingOutput)
    assert reporting.get_kv_connector_output() == KVConnectorOutput()
    received = reporting.get_output()
    assert received.sampled_token_ids == [[5]]
    assert reports_of(received) == (PageReport("a", 0, (31, 32)), PageReport("b", 1, (11,)))
    assert CompactingRunnerV2._report(runner, output) is output
