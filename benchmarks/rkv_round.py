"""Time one of R-KV's compaction rounds on a GPU, stage by stage, beside its floor and beside plain torch.

The default is DeepSeek-R1-Distill-Llama-8B in bfloat16 (32 layers, 8 KV heads, 32 query heads, head size
128), pages of 16 tokens, eight requests a round. Times are medians of CUDA events, with the work enqueued
ahead, divided by the number of requests. Three kinds of keys are timed, since the search for matches ends
early where it can:

* independent: random directions; no key has a match, the search visits half of all pairs.
* some matches: a common direction makes a mean similarity of 0.36, below the threshold. The search visits
  most pairs, from both of their keys: the worst case.
* alike: mean similarity 0.8; nearly every pair is a match.

The floor of a stage is what it must compute over the rate of the tensor cores, or the bytes that it must
read and write once over the bandwidth, both as a matrix product and a copy reach them on the same device; a
round's floor is the sum of its stages' floors. For the matches it is half of all pairs, since the matrix is
symmetric, and for whatever keys: where the search ends early it can take less.

With ``--cache-dtype fp8_e4m3`` or ``fp8_e5m2`` keys and values take a byte each, and floors count them so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton

from rkv_vllm.bench.hardware_limits import measure_device
from rkv_vllm.bench.roofline import HardwareLimits
from rkv_vllm.kernels import tiled
from rkv_vllm.kernels.batch import CompactionBatch, QueryWindow
from rkv_vllm.kernels.cache_layout import FP8, PagedKV
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.importance import window_statistics
from rkv_vllm.kernels.joint_scores import combine
from rkv_vllm.kernels.matches import MatchTiles, newest_matches
from rkv_vllm.kernels.move import compact
from rkv_vllm.kernels.rkv_scorer import RkvScorer
from rkv_vllm.kernels.select import select
from rkv_vllm.kernels.window_sums import attention_and_link_sums
from rkv_vllm.provenance import command_line

STAGES = ("survey", "matches", "sums", "combine", "select", "move")
CACHES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SHIFTS = {"independent": 0.0, "some matches": 0.75, "alike": 2.0}
WINDOW, THRESHOLD, POOL, LAM = 8, 0.5, 7, 0.1


class Setup:
    """A cache with requests of one length, scattered over its pages; survivors go to other pages.

    Other pages, so that every repetition scores the same keys.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        limits: HardwareLimits,
        length: int,
        keep: int,
        shift: float,
        looked_at: int = WINDOW,
        match_tiles: MatchTiles | None = None,
    ) -> None:
        self.match_tiles = match_tiles
        self.arguments, self.limits, self.length, self.keep = arguments, limits, length, keep
        layers, heads, size = arguments.layers, arguments.kv_heads, arguments.head_size
        page_size, requests = arguments.page_size, arguments.requests
        source, target = -(-length // page_size), -(-keep // page_size)
        pages = requests * (source + target)
        generator = torch.Generator(device="cuda").manual_seed(0)
        shape = (layers, pages, heads, page_size, 2 * size)
        buffer = torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)
        common = torch.randn((layers, 1, heads, 1, size), device="cuda", generator=generator)
        for layer in range(layers):
            buffer[layer, ..., :size] += (shift * common[layer]).bfloat16()
        self.kv = PagedKV(list(buffer.to(CACHES[arguments.cache_dtype]).unbind()))
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        self.batch = CompactionBatch.build(
            lengths=[length] * requests,
            keeps=[keep] * requests,
            source_pages=[order[index * source : (index + 1) * source] for index in range(requests)],
            target_pages=[order[(index + 1) * -target :][:target] for index in range(requests)],
            page_size=page_size,
            device="cuda",
            queries=[QueryWindow(row, length, looked_at) for row in range(requests)],
        )
        ring = (layers, requests, looked_at, arguments.query_heads, size)
        self.queries = torch.randn(ring, dtype=torch.bfloat16, device="cuda", generator=generator)
        self.lam = torch.full((requests,), LAM, device="cuda")
        self.factors = self.kv.equal_factors(size**-0.5)
        self.scorer = RkvScorer(self.queries, self.factors, self.lam, threshold=THRESHOLD, pool_kernel=POOL)
        self.round = CompactionRound(self.kv, window=WINDOW)

    def stages(self) -> dict[str, list[Callable[[], None]]]:
        """The round's stages, one call a slice of the batch, in the order of ``CompactionRound.run``."""
        calls: dict[str, list[Callable[[], None]]] = {stage: [] for stage in STAGES}
        queries = (self.queries, self.factors)
        for work in self.round.slices(self.batch):
            scores = work.scores_by_head
            calls["survey"].append(partial(window_statistics, work, *queries, window=WINDOW))
            calls["matches"].append(
                partial(newest_matches, work, self.lam, threshold=THRESHOLD, tiles=self.match_tiles)
            )
            calls["sums"].append(partial(attention_and_link_sums, work, *queries, self.lam, window=WINDOW))
            calls["combine"].append(partial(combine, work, self.lam, scores, window=WINDOW, pool_kernel=POOL))
            calls["select"].append(partial(select, work, scores, window=WINDOW))
            calls["move"].append(partial(compact, work, window=WINDOW))
        return calls

    def floors(self) -> dict[str, float]:
        """Milliseconds a request below which no implementation of a stage can be."""
        arguments = self.arguments
        heads = arguments.layers * arguments.kv_heads
        key_bytes = heads * self.length * arguments.head_size * self.kv.dtype.itemsize
        products = heads * self.length**2 * arguments.head_size  # symmetric: half of 2 N^2 D
        moved = 2 * heads * self.keep * 2 * arguments.head_size * self.kv.dtype.itemsize
        bandwidth = self.limits.bytes_per_second / 1000  # a millisecond
        rate = self.limits.operations_per_second / 1000
        return {
            "survey": key_bytes / bandwidth,
            "matches": products / rate,
            "sums": key_bytes / bandwidth,
            "combine": heads * self.length * 16 / bandwidth,
            "select": heads * self.length * 8 / bandwidth,
            "move": moved / bandwidth,
        }

    def torch_round(self, request: int) -> None:
        """The same round for one request in plain torch, on gathered keys."""
        size, page_size = self.arguments.head_size, self.arguments.page_size
        is_fp8 = self.kv.dtype in FP8  # which torch gathers as bytes alone
        source = self.batch.source_pages[request].long()
        target = self.batch.target_pages[request].long()
        layers = [layer.view(torch.uint8) if is_fp8 else layer for layer in self.kv.layers]
        gathered = torch.stack([layer[source] for layer in layers])  # [L, pages, H, page size, 2 D]
        tokens = gathered.transpose(1, 2).flatten(2, 3)[:, :, : self.length]
        keys = tokens[..., :size]
        scores = tiled.rkv_scores(
            self.queries[:, request].transpose(1, 2),
            keys.view(self.kv.dtype).half() if is_fp8 else keys,
            window=WINDOW,
            lam=LAM,
            threshold=THRESHOLD,
            pool_kernel=POOL,
        )
        chosen = tiled.select(scores, self.keep - WINDOW)
        tail = torch.arange(self.length - WINDOW, self.length, device="cuda").expand(
            *chosen.shape[:2], WINDOW
        )
        kept = torch.cat([chosen, tail], dim=-1).unsqueeze(-1).expand(-1, -1, -1, 2 * size)
        moved = tokens.gather(2, kept).unflatten(2, (-1, page_size)).transpose(1, 2)
        for layer, data in zip(layers, moved, strict=True):
            layer[target] = data


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def time_stages(setup: Setup, repetitions: int) -> dict[str, float]:
    """Median milliseconds a request of each stage and of the whole round."""
    calls = setup.stages()
    stages = list(calls)
    slices = len(calls["select"])
    samples: dict[str, list[float]] = {stage: [] for stage in (*stages, "round")}
    for repetition in range(repetitions + 2):
        marks = [[event() for _ in range(len(stages) + 1)] for _ in range(slices)]
        torch.cuda._sleep(4_000_000)  # the host enqueues everything in the meantime
        for index_of_slice in range(slices):
            marks[index_of_slice][0].record()
            for index, stage in enumerate(stages):
                calls[stage][index_of_slice]()
                marks[index_of_slice][index + 1].record()
        torch.cuda.synchronize()
        if repetition < 2:
            continue
        for index, stage in enumerate(stages):
            samples[stage].append(sum(mark[index].elapsed_time(mark[index + 1]) for mark in marks))
        samples["round"].append(sum(mark[0].elapsed_time(mark[-1]) for mark in marks))
    requests = setup.batch.num_requests
    return {stage: statistics.median(values) / requests for stage, values in samples.items()}


def time_call(call: Callable[[], None], repetitions: int) -> float:
    """Median milliseconds of a call on the device."""
    samples = []
    for repetition in range(repetitions + 1):
        start, end = event(), event()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repetition:
            samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def measure(
    arguments: argparse.Namespace, limits: HardwareLimits, length: int, keep: int
) -> list[dict[str, object]]:
    """One row a kind of keys for one length."""
    rows: list[dict[str, object]] = []
    for keys, shift in SHIFTS.items():
        setup = Setup(arguments, limits, length, keep, shift, match_tiles=arguments.match_tiles)
        setup.round.warm_up([RkvScorer(setup.queries, setup.factors, setup.lam[:1])])
        setup.round.run(setup.scorer, setup.batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        setup.round.run(setup.scorer, setup.batch)
        torch.cuda.synchronize()
        beyond_scratch = torch.cuda.max_memory_allocated() - before
        whole = time_call(partial(setup.round.run, setup.scorer, setup.batch), 5)
        times, floors = time_stages(setup, arguments.repetitions), setup.floors()
        plain = time_call(partial(setup.torch_round, 0), 2) if keys == "independent" else None
        rows.append(
            {
                "length": length,
                "keep": keep,
                "keys": keys,
                "milliseconds_per_request": times,
                "call_milliseconds_per_request": whole / arguments.requests,
                "floor_milliseconds_per_request": floors,
                "floor_of_round": sum(floors.values()),
                "ratio_to_floor": times["round"] / sum(floors.values()),
                "parts": len(setup.stages()["survey"]),
                "scratch_bytes": setup.round.scratch.num_bytes,
                "bytes_beyond_scratch": beyond_scratch,
                "torch_milliseconds_per_request": plain,
            }
        )
        del setup
        torch.cuda.empty_cache()
    return rows


def show(row: dict[str, object]) -> None:
    times, floors = row["milliseconds_per_request"], row["floor_milliseconds_per_request"]
    assert isinstance(times, dict) and isinstance(floors, dict)
    stages = "  ".join(f"{stage} {times[stage]:.3f} ({floors[stage]:.3f})" for stage in STAGES)
    print(
        f"N {row['length']:>5} keep {row['keep']:>5} {row['keys']:<13} "
        f"round {times['round']:.3f} ms a request, floor {row['floor_of_round']:.3f}, "
        f"ratio {row['ratio_to_floor']:.2f}, call {row['call_milliseconds_per_request']:.3f}, "
        f"torch {row['torch_milliseconds_per_request']}\n    {stages}",
        flush=True,
    )


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Options for the model and the batch; Llama-3.1-8B's in bfloat16 and eight requests by default."""
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument(
        "--cache-dtype", choices=CACHES, default="bfloat16", help="what the cache holds; queries are bfloat16"
    )


def match_tiles_of(text: str) -> MatchTiles:
    return MatchTiles(*map(int, text.split(":")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape(parser)
    parser.add_argument(
        "--lengths", default="1152:1024,2176:2048,4224:4096", help="length:keep, comma separated"
    )
    parser.add_argument(
        "--match-tiles",
        type=match_tiles_of,
        metavar="ROWS:COLUMNS:SPAN:WARPS:STAGES[:REGISTERS]",
        help="launch shape of the search for matches; the package's own by default",
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the raw numbers")
    arguments = parser.parse_args()
    device = measure_device()
    if device.limits is None:
        sys.exit("this benchmark needs a CUDA device")
    torch.cuda.empty_cache()
    rows = []
    for pair in arguments.lengths.split(","):
        length, keep = map(int, pair.split(":"))
        for row in measure(arguments, device.limits, length, keep):
            show(row)
            rows.append(row)
    if arguments.json:
        report = {
            "command": command_line("python", "benchmarks/rkv_round.py"),
            "device": device.model_dump(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "settings": {
                name: vars(value) if isinstance(value, MatchTiles) else value
                for name, value in vars(arguments).items()
                if name not in ("json", "lengths")
            },
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
