"""Time the compaction of one layer of one request on a CPU, by policy and length.

The default is a layer of the demo's model, SmolLM2-135M in bfloat16 (3 KV heads, 9 query heads, head size 64;
it has 30 of them), in pages of 128 tokens. All of it is timed: read, score, select, write. Survivors go to
other pages, so that every repetition scores the same keys.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from rkv_vllm.decisions.messages import TokenCompaction
from rkv_vllm.execution.cpu.compactor import CpuTokenCompactor
from rkv_vllm.execution.cpu.layer_cache import CpuLayerCache
from rkv_vllm.execution.cpu.query_ring import CpuQueryRing
from rkv_vllm.execution.layer_groups import LayerGroup
from rkv_vllm.execution.stored_types import FP8_TYPES
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.policies import make_policies
from rkv_vllm.settings.config import PolicyName, RkvConfig
from rkv_vllm.settings.policy_table import NUM_QUERIES, POLICY_NAMES, RING_SIZE

LENGTHS = ((640, 512), (1152, 1024), (2176, 2048))  # before and after: buffer 128


def layer(arguments: argparse.Namespace, pages: int) -> Any:
    """What `CpuLayerCache` takes from an attention layer; its cache is noise."""
    shape = (pages, arguments.kv_heads, arguments.page_size, 2 * arguments.head_size)
    name, noise = arguments.cache_dtype, torch.randn(shape, dtype=torch.bfloat16)
    return SimpleNamespace(
        kv_cache=noise.to(FP8_TYPES[name]).view(torch.uint8) if name in FP8_TYPES else noise,
        isa=_get_attn_isa(torch.bfloat16, arguments.page_size, arguments.head_size, name),
        head_size=arguments.head_size,
        dtype=torch.bfloat16,
        kv_cache_dtype=name,
        _k_scale_float=1.0,
        impl=SimpleNamespace(scale=arguments.head_size**-0.5),
    )


class Queries(CpuQueryRing):
    """A window that no attention layer wrote."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        shape = (arguments.query_heads, RING_SIZE, arguments.head_size)
        self._queries = torch.randn(shape, dtype=torch.bfloat16)

    def newest(self, layer: int, row: int, end: int, count: int) -> torch.Tensor:
        return self._queries[:, :count]


class NoTables:
    """A block table that nobody reads."""

    def pages_of(self, request_id: str) -> list[int]:
        return []

    def replace_pages(self, request_id: str, pages: Sequence[int]) -> None:
        pass


def milliseconds(arguments: argparse.Namespace, policy: PolicyName, length: int, keep: int) -> float:
    source, target = -(-length // arguments.page_size), -(-keep // arguments.page_size)
    cache = CpuLayerCache(layer(arguments, source + target))
    config = RkvConfig()
    pairs = RotaryPairs(arguments.head_size)
    compactor = CpuTokenCompactor(
        [cache], Queries(arguments), config, make_policies(config), pairs, LayerGroup(0, 0, (0,))
    )
    compaction = TokenCompaction(
        request_id="",
        source_pages=(tuple(range(source)),),
        target_pages=(tuple(range(source, source + target)),),
        length=length,
        keep=keep,
        evicted=length - keep,
        policy=policy,
        query_row=0,
        num_queries=NUM_QUERIES[policy],
    )
    compactor.run([compaction], NoTables())  # warm-up
    times = []
    for _ in range(arguments.repetitions):
        started = time.perf_counter()
        compactor.run([compaction], NoTables())
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--query-heads", type=int, default=9)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--cache-dtype", choices=("auto", *FP8_TYPES), default="auto", help="auto: bfloat16")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where to write the raw numbers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table("tokens, kept", *POLICY_NAMES, title=f"ms a layer, {torch.get_num_threads()} threads")
    rows = []
    for length, keep in LENGTHS:
        row = {policy: milliseconds(arguments, policy, length, keep) for policy in POLICY_NAMES}
        rows.append({"length": length, "keep": keep, "milliseconds": row})
        table.add_row(f"{length:,}, {keep:,}", *(f"{value:.1f}" for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
