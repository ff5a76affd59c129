"""What Model Runner V2's adapter does about pages that leave, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from rkv_vllm.decisions.messages import PageCompaction, PageReport, reports_of
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
    """The adapter's methods on vLLM's block table in small: two requests in slots 3 and 1."""
    written: list[tuple[int, tuple[list[int], ...], bool]] = []
    return SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={"a": 3, "b": 1}),
        block_tables=SimpleNamespace(
            block_tables=[SimpleNamespace(gpu=torch.arange(40, dtype=torch.int32).view(4, 10))],
            num_blocks=SimpleNamespace(np=np.full((1, 4), 5, dtype=np.int32)),
            append_block_ids=lambda slot, ids, overwrite: written.append((slot, ids, overwrite)),
        ),
        _compactor=Evicting(),
        written=written,
    )


def test_vllm_is_what_the_adapter_was_written_against() -> None:
    """Proves that every method which the GPU adapter overrides or calls takes what it should."""
    assert contract_problems(CONTRACT_V2_RUNNER) == []


def test_a_row_is_rewritten_in_place(runner: Any) -> None:
    """Proves that the row of a request is a view of its own entries of vLLM's table on the device."""
    CompactingRunnerV2.page_row(runner, "b")[0] = 99
    assert runner.block_tables.block_tables[0].gpu[:, 0].tolist() == [0, 99, 20, 30]


def test_new_pages_go_behind_what_stays(runner: Any) -> None:
    """Proves that the count of the request's own row alone is set."""
    CompactingRunnerV2.set_num_pages(runner, "a", 3)
    CompactingRunnerV2.set_num_pages(runner, "b", 4)
    assert runner.block_tables.num_blocks.np.tolist() == [[5, 4, 5, 3]]


def test_named_pages_replace_all_that_the_request_had(runner: Any) -> None:
    """Proves that pages which the scheduler names overwrite the request's own row."""
    CompactingRunnerV2.replace_pages(runner, "a", (7, 8))
    assert runner.written == [(3, ([7, 8],), True)]


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
