"""Compiles every kernel of a round and a step for an H100, on a machine that need not have one.

Triton takes the target from its driver and compiles before it launches; here the driver only names a target,
and nothing is launched. Prints a JSON object a kernel: its name, and the shared memory it takes in bytes.

    python compile_for_hopper.py DTYPE QUERY_DTYPE HEAD_SIZE ROTATED GROUP
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.invariant_scorer import InvariantScorer
from rkv_vllm.kernels.query_capture import capture
from rkv_vllm.kernels.rkv_scorer import RkvScorer
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.kernels.step_inputs import prepare_physical
from rkv_vllm.settings.policy_table import RING_SIZE
from support.paged_cache import PagedCache


class Hopper:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, **kwargs: Any) -> Any:
    compiled = launch(kernel, *args, grid=grid, **kwargs | {"warmup": True})
    print(json.dumps({"kernel": kernel.fn.__name__, "shared": compiled.metadata.shared}))
    return compiled


launch = JITFunction.run


def main(dtype: str, query_dtype: str, head_size: int, rotated: int, group: int) -> None:
    driver.set_active(Hopper())
    JITFunction.run = compile_only
    cache = PagedCache(
        [40],
        heads=2,
        group=group,
        head_size=head_size,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )
    queries, lam = cache.queries.to(getattr(torch, query_dtype)), torch.tensor([0.5])
    scorers = [
        RkvScorer(queries, cache.factors, lam),
        InvariantScorer(queries, cache.factors, lam, pairs=RotaryPairs(rotated)),
    ]
    for scope, order in (("head", "temporal"), ("layer", "score"), ("global", "score")):
        CompactionRound(cache.kv, scope=scope).warm_up(scorers, order)
    counts = torch.zeros(8, dtype=torch.int32)
    prepare_physical(
        counts[:2],
        counts,
        counts,
        counts,
        counts,
        physical_seq_lens=counts,
        physical_positions=counts.long(),
        ring_indices=counts,
        ring_size=RING_SIZE,
    )
    capture(queries[0, 0], counts, queries[0])
    capture(queries[0, 0].to(torch.float8_e4m3fn), counts, queries[0])


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
