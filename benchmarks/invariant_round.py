"""Time one of policy invariant's compaction rounds on a GPU, stage by stage, beside its floor.

Model, pages, requests and timing are those of rkv_round.py. The keys do not matter: nothing is searched. The
floor of the scores is the larger of the keys' bytes, read once, and the products with the queries, computed
twice, at the rates that a copy and a matrix product reach on the same device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rkv_round import WINDOW, Setup, add_shape, time_call, time_stages

from rkv_vllm.bench.hardware_limits import measure_device
from rkv_vllm.bench.roofline import HardwareLimits
from rkv_vllm.kernels.invariant_attention import attention_and_directions
from rkv_vllm.kernels.invariant_redundancy import invariant_redundancy
from rkv_vllm.kernels.invariant_scorer import InvariantScorer
from rkv_vllm.kernels.invariant_statistics import query_statistics
from rkv_vllm.kernels.move import compact
from rkv_vllm.kernels.rotary_pairs import RotaryPairs
from rkv_vllm.kernels.select import select
from rkv_vllm.kernels.span_records import KeyTiles, SpanRecords
from rkv_vllm.kernels.standard_scores import standard_scores
from rkv_vllm.policies import weights
from rkv_vllm.policies.invariant import POOL_KERNEL
from rkv_vllm.provenance import command_line
from rkv_vllm.settings.config import RkvConfig

STAGES = ("statistics", "attention", "redundancy", "standard", "select", "move")
LAM = weights(RkvConfig())["invariant"]


class InvariantSetup(Setup):
    """The same cache and requests, scored by some of the newest queries."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        limits: HardwareLimits,
        length: int,
        keep: int,
        tiles: KeyTiles | None,
    ) -> None:
        super().__init__(arguments, limits, length, keep, shift=0.0, looked_at=arguments.queries)
        self.lam = torch.full_like(self.lam, LAM)
        self.pairs = RotaryPairs(arguments.head_size)
        self.tiles = tiles
        self.scorer = InvariantScorer(self.queries, self.factors, self.lam, pairs=self.pairs)

    def stages(self) -> dict[str, list[Callable[[], None]]]:
        calls: dict[str, list[Callable[[], None]]] = {stage: [] for stage in STAGES}
        records = SpanRecords.of(self.kv, self.queries, self.pairs)
        assert records.parts == 1, "more queries than one product takes are not timed by stages"
        of_keys: dict[str, Any] = {"pairs": self.pairs, "window": WINDOW, "tiles": self.tiles}
        for work in self.round.slices(self.batch):
            scores, looked_at = work.scores_by_head, (self.queries, self.factors, records, 0)
            calls["statistics"].append(partial(query_statistics, work, *looked_at, **of_keys))
            calls["attention"].append(partial(attention_and_directions, work, *looked_at, **of_keys))
            calls["redundancy"].append(partial(invariant_redundancy, work, records, **of_keys))
            calls["standard"].append(
                partial(standard_scores, work, self.lam, scores, window=WINDOW, pool_kernel=POOL_KERNEL)
            )
            calls["select"].append(partial(select, work, scores, window=WINDOW))
            calls["move"].append(partial(compact, work, window=WINDOW))
        return calls

    def floors(self) -> dict[str, float]:
        """Milliseconds a request below which no implementation of a round can be, by what it does."""
        arguments, floors = self.arguments, super().floors()
        rows = arguments.queries * arguments.query_heads * arguments.layers
        products = 2 * 2 * rows * self.length * arguments.head_size
        rate = self.limits.operations_per_second / 1000
        return {
            "scores": max(floors["survey"], products / rate),
            "select": floors["select"],
            "move": floors["move"],
        }


def measure(
    arguments: argparse.Namespace, limits: HardwareLimits, length: int, keep: int, tiles: KeyTiles | None
) -> dict[str, Any]:
    setup = InvariantSetup(arguments, limits, length, keep, tiles)
    setup.round.run(setup.scorer, setup.batch)
    times, floors = time_stages(setup, arguments.repetitions), setup.floors()
    whole = time_call(partial(setup.round.run, setup.scorer, setup.batch), 5)
    return {
        "length": length,
        "keep": keep,
        "queries": arguments.queries,
        "cache_dtype": arguments.cache_dtype,
        "tiles": None if tiles is None else vars(tiles),
        "milliseconds_per_request": times,
        "call_milliseconds_per_request": whole / arguments.requests,
        "floor_milliseconds_per_request": floors,
        "ratio_to_floor": times["round"] / sum(floors.values()),
    }


def tiles_of(text: str) -> KeyTiles:
    tokens, warps, stages = map(int, text.split(":"))
    return KeyTiles(tokens=tokens, warps=warps, stages=stages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape(parser)
    parser.add_argument("--queries", type=int, default=16, help="newest queries that are looked at")
    parser.add_argument(
        "--lengths", default="1152:1024,4224:4096,32768:1024", help="length:keep, comma separated"
    )
    parser.add_argument(
        "--tiles",
        type=tiles_of,
        nargs="*",
        default=[None],
        metavar="TOKENS:WARPS:STAGES",
        help="launch shapes of the walks to compare; the package's own by default",
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the raw numbers")
    arguments = parser.parse_args()
    device = measure_device()
    if device.limits is None:
        sys.exit("this benchmark needs a CUDA device")
    rows = []
    for pair in arguments.lengths.split(","):
        length, keep = map(int, pair.split(":"))
        for tiles in arguments.tiles:
            torch.cuda.empty_cache()
            row = measure(arguments, device.limits, length, keep, tiles)
            print(json.dumps(row), flush=True)
            rows.append(row)
    if arguments.json:
        report = {
            "command": command_line("python", "benchmarks/invariant_round.py"),
            "device": device.model_dump(),
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
