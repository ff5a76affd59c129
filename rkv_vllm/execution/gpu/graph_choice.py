"""Which captured CUDA graph a batch of decoding requests is padded to: the fastest one that holds it.

vLLM pads a batch to the next captured size. A matrix product of some sizes takes longer than that of larger
ones, by up to 40 % (`benchmarks/step_costs.py`), and with compacted requests, of which hundreds run, products
are a third of a step. Padded rows hold no keys, so that a larger graph costs nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from rkv_vllm.host.retype import retype

logger = init_logger(f"vllm.{__name__}")  # vLLM sets up its own loggers only

#: Batches up to here are padded as in stock vLLM, so that they get its very products, to the last bit.
STOCK_PADDING_UP_TO = 256
#: Share of its time by which a larger graph has to be faster to be taken.
MIN_SPEEDUP = 0.01
#: Timed runs of each graph, of which the fastest counts.
TIMED_REPLAYS = 4


class FastestGraphManager(ModelCudaGraphManager):
    """vLLM's graphs, some of them replaced by faster and larger ones when a batch asks for its graph."""

    #: Graph that vLLM would choose -> graph that is taken.
    replacement: Mapping[BatchExecutionDescriptor, BatchExecutionDescriptor]

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        num_ubatches: int = 1,
    ) -> BatchExecutionDescriptor:
        chosen = super().dispatch(
            num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len, num_ubatches
        )
        return self.replacement.get(chosen, chosen)


def prefer_fastest(manager: ModelCudaGraphManager) -> None:
    """Times the graphs of more than `STOCK_PADDING_UP_TO` requests, and chooses by that from now on.

    vLLM makes `manager` itself and has no hook on the choice.
    """
    graphs = [graph for graph in manager.graphs if _is_plain_decode(graph)]
    milliseconds = {graph.num_tokens: _milliseconds(manager, graph) for graph in graphs}
    larger = fastest_sizes(milliseconds)
    by_size = {graph.num_tokens: graph for graph in graphs}
    fastest = retype(manager, FastestGraphManager)
    fastest.replacement = {by_size[size]: by_size[other] for size, other in larger.items() if size != other}
    if fastest.replacement:
        logger.info(
            "More than %d decoding requests are padded to the fastest graph that holds them, one of %s",
            STOCK_PADDING_UP_TO,
            ", ".join(f"{size} ({milliseconds[size]:.2f} ms)" for size in sorted(set(larger.values()))),
        )


def fastest_sizes(milliseconds: Mapping[int, float]) -> dict[int, int]:
    """For each captured size, the one to take: at least as large, and the smallest of the fastest.

    Args:
        milliseconds: how long a graph of each size takes.
    """
    fastest: dict[int, int] = {}
    best: int | None = None
    for size in sorted(milliseconds, reverse=True):
        if best is None or milliseconds[size] <= milliseconds[best] * (1 + MIN_SPEEDUP):
            best = size
        fastest[size] = best
    return fastest


def _is_plain_decode(graph: BatchExecutionDescriptor) -> bool:
    """Whether a graph, replayed whole as all of `manager.graphs` are, is of decoding requests alone."""
    return (
        graph.num_tokens > STOCK_PADDING_UP_TO
        and graph.uniform_token_count == 1
        and graph.num_active_loras == 0
        and graph.num_ubatches == 1
    )


def _milliseconds(manager: ModelCudaGraphManager, graph: BatchExecutionDescriptor) -> float:
    """Replays a graph on what vLLM left in its buffers: requests that hold no pages."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        manager.run_fullgraph(graph)
        mark.record()
    torch.cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in pairwise(marks))
