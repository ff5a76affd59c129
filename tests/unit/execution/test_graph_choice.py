"""Which graph a decoding batch is padded to, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CUDAGraphMode,
    ModelCudaGraphManager,
)

from rkv_vllm.execution.gpu import graph_choice
from rkv_vllm.execution.gpu.graph_choice import fastest_sizes, prefer_fastest

#: Milliseconds of a graph's replay by its size: 272 is slow, 400 and 448 are, and so would 8 be.
TIMES = {8: 90.0, 256: 6.0, 272: 9.0, 288: 7.0, 400: 10.8, 432: 8.9, 448: 13.8, 512: 9.6}


def test_a_faster_larger_size_is_taken() -> None:
    """Proves that each size goes to the fastest at least as large, and that the largest stays."""
    assert fastest_sizes(TIMES) == {
        8: 256,
        256: 256,
        272: 288,
        288: 288,
        400: 432,
        432: 432,
        448: 512,
        512: 512,
    }


def test_a_gain_within_noise_is_none() -> None:
    """Proves that only a graph that is faster by more than 1 % is taken, one step or several away."""
    assert fastest_sizes({272: 10.05, 288: 10.0}) == {272: 272, 288: 288}
    assert fastest_sizes({272: 10.2, 288: 10.05, 304: 10.0}) == {272: 288, 288: 288, 304: 304}


def test_no_graphs_no_choice() -> None:
    """Proves that an engine without graphs of that kind is left alone."""
    assert fastest_sizes({}) == {}


def decode(size: int, **changed: Any) -> BatchExecutionDescriptor:
    fields = {"cg_mode": CUDAGraphMode.FULL, "num_tokens": size, "num_reqs": size, "uniform_token_count": 1}
    return BatchExecutionDescriptor(**{**fields, **changed})


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> ModelCudaGraphManager:
    """vLLM's manager with graphs of all sizes and kinds, their times made up."""
    manager = object.__new__(ModelCudaGraphManager)
    piecewise = decode(512, cg_mode=CUDAGraphMode.PIECEWISE, num_reqs=None, uniform_token_count=None)
    others = [{"num_active_loras": 1}, {"uniform_token_count": None}, {"num_ubatches": 2}]
    manager.graphs = dict.fromkeys([*map(decode, TIMES), *(decode(400, **other) for other in others)])
    manager._graphs_captured = True
    manager._lora_dispatch_map, manager._max_lora_case = {1: 1}, 1
    manager._candidates = {}
    for tokens in range(1, 400):
        next_size = min(size for size in TIMES if size >= tokens)
        manager._candidates[tokens, 0] = [decode(next_size), piecewise]
        manager._candidates[tokens, 1] = [decode(400, num_active_loras=1), piecewise]

    def milliseconds(of: ModelCudaGraphManager, graph: BatchExecutionDescriptor) -> float:
        assert of is manager and graph.num_tokens > 256 and graph == decode(graph.num_tokens)
        return TIMES[graph.num_tokens]

    monkeypatch.setattr(graph_choice, "_milliseconds", milliseconds)
    prefer_fastest(manager)
    return manager


@pytest.mark.parametrize(
    ("requests", "size"), [(3, 8), (250, 256), (256, 256), (257, 288), (280, 288), (290, 432), (399, 432)]
)
def test_batches_go_to_the_fastest_graph(manager: ModelCudaGraphManager, requests: int, size: int) -> None:
    """Proves that vLLM's own dispatch gives the faster graph above 256 requests, and its own up to there."""
    assert manager.dispatch(requests, requests, 1, 0) == decode(size)


def test_other_graphs_are_as_they_were(manager: ModelCudaGraphManager) -> None:
    """Proves that batches with prompts, and batches with LoRA adapters, get the graphs that vLLM chooses."""
    assert manager.dispatch(280, 290, None, 0).cg_mode == CUDAGraphMode.PIECEWISE
    assert manager.dispatch(399, 399, 1, 1) == decode(400, num_active_loras=1)
    assert manager.dispatch(700, 700, 1, 0).cg_mode == CUDAGraphMode.NONE
