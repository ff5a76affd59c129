"""Time one compaction round on a GPU, stage by stage, beside its floor and beside plain torch.

The default is DeepSeek-R1-Distill-Llama-8B in bfloat16 (32 layers, 8 KV heads, 32 query heads, head size
128), pages of 16 tokens, eight requests a round. Times are medians of CUDA events, with the work enqueued
ahead, divided by the number of requests. Three kinds of keys are timed, since the search for matches ends
early where it can:

* independent: random directions; no key has a match, the search visits half of all pairs.
* some matches: a common direction makes a mean similarity of 0.36, below the threshold. The search visits
  most pairs, from both of their keys: the worst case.
* alike: mean similarity 0.8; nearly every pair is a match.

Each is timed as a request's first round, and as a later one, which knows of its survivors which had a match.

The floor of a stage is what it must compute over the rate of the tensor cores, or the bytes that it must
read and write once over the bandwidth, both as a matrix product and a copy reach them on the same device; a
round's floor is the sum of its stages' floors. For the matches it is half of all pairs, since the matrix is
symmetric, or in a later round of those with a new key, and for whatever keys: where the search ends early it
can take less.
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

from rkv_vllm.bench.ceilings import measure_device
from rkv_vllm.bench.floor import Ceilings
from rkv_vllm.kernels import tiled
from rkv_vllm.kernels.combine import combine
from rkv_vllm.kernels.compact import compact
from rkv_vllm.kernels.importance import survey
from rkv_vllm.kernels.lone import remember
from rkv_vllm.kernels.paged import CompactionBatch, PagedKV
from rkv_vllm.kernels.pipeline import RkvRound
from rkv_vllm.kernels.redundancy import newest_matches, sums
from rkv_vllm.kernels.select import select
from rkv_vllm.provenance import command_line

STAGES = ("survey", "matches", "sums", "combine", "select", "remember", "move")
SHIFTS = {"independent": 0.0, "some matches": 0.75, "alike": 2.0}
WINDOW, THRESHOLD, POOL, LAM = 8, 0.5, 7, 0.1


class Setup:
    """A cache with requests of one length, scattered over its pages; survivors go to other pages.

    Other pages, so that every repetition scores the same keys.
    """

    def __init__(
        self, arguments: argparse.Namespace, ceilings: Ceilings, length: int, keep: int, shift: float
    ) -> None:
        self.arguments, self.ceilings, self.length, self.keep = arguments, ceilings, length, keep
        self.survivors = 0
        layers, heads, size = arguments.layers, arguments.kv_heads, arguments.head_size
        page_size, requests = arguments.page_size, arguments.requests
        source, target = -(-length // page_size), -(-keep // page_size)
        pages = requests * (source + target)
        self._generator = generator = torch.Generator(device="cuda").manual_seed(0)
        self._common = shift * torch.randn((layers, 1, heads, 1, size), device="cuda", generator=generator)
        buffer = torch.empty((layers, pages, heads, page_size, 2 * size), dtype=torch.bfloat16, device="cuda")
        self.kv = PagedKV(list(buffer.unbind()))
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
        self._fill(order)
        self._source = [order[index * source : (index + 1) * source] for index in range(requests)]
        self._target = [order[(index + 1) * -target :][:target] for index in range(requests)]
        self.batch = self._batch(self._target)
        ring = (layers, requests, WINDOW, arguments.query_heads, size)
        self.queries = torch.randn(ring, dtype=torch.bfloat16, device="cuda", generator=generator)
        self.lam = torch.full((requests,), LAM, device="cuda")
        self.round = RkvRound(self.kv, window=WINDOW, threshold=THRESHOLD, pool_kernel=POOL)

    def _fill(self, pages: list[int]) -> None:
        """Gives pages new tokens."""
        where = torch.tensor(pages, device="cuda")
        for layer, common in zip(self.kv.layers, self._common, strict=True):
            shape = (len(pages), *layer.shape[1:])
            tokens = torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=self._generator)
            tokens[..., : self.kv.head_size] += common.bfloat16()
            layer[where] = tokens

    def _batch(self, target: list[list[int]]) -> CompactionBatch:
        requests = self.arguments.requests
        return CompactionBatch.build(
            lengths=[self.length] * requests,
            keeps=[self.keep] * requests,
            source_pages=self._source,
            target_pages=target,
            query_rows=list(range(requests)),
            page_size=self.kv.page_size,
            device="cuda",
            survivors=[self.survivors] * requests,
        )

    def go_on(self) -> None:
        """Compacts every request in its own pages, and puts new tokens behind its survivors."""
        self.round.run(self.queries, self._batch(self._source), self.lam)
        self.survivors = self.keep
        self._fill([page for pages in self._source for page in pages[self.keep // self.kv.page_size :]])
        self.batch = self._batch(self._target)

    def stages(self) -> dict[str, list[Callable[[], None]]]:
        """The round's stages, one call a part of the batch, in the order of ``RkvRound.run``."""
        calls: dict[str, list[Callable[[], None]]] = {stage: [] for stage in STAGES}
        walk = {"window": WINDOW, "scale": self.round.scale}
        for part in self.round._all_parts(self.batch):
            scores = self.round._own_scores(part)
            calls["survey"].append(partial(survey, part, self.queries, **walk))
            bits = self.round._lone_bits
            calls["matches"].append(partial(newest_matches, part, self.lam, bits, threshold=THRESHOLD))
            calls["sums"].append(partial(sums, part, self.queries, self.lam, **walk))
            calls["combine"].append(partial(combine, part, self.lam, scores, window=WINDOW, pool_kernel=POOL))
            calls["select"].append(partial(select, part, scores, window=WINDOW))
            calls["remember"].append(partial(remember, part, bits, window=WINDOW))
            calls["move"].append(partial(compact, part, window=WINDOW))
        return calls

    def floors(self) -> dict[str, float]:
        """Milliseconds a request below which no implementation of a stage can be."""
        arguments = self.arguments
        heads = arguments.layers * arguments.kv_heads
        key_bytes = heads * self.length * arguments.head_size * 2
        # Symmetric: half of 2 N^2 D.
        products = heads * (self.length**2 - self.survivors**2) * arguments.head_size
        moved = 2 * heads * self.keep * 2 * arguments.head_size * 2
        bandwidth = self.ceilings.bytes_per_second / 1000  # a millisecond
        rate = self.ceilings.operations_per_second / 1000
        return {
            "survey": key_bytes / bandwidth,
            "matches": products / rate,
            "sums": key_bytes / bandwidth,
            "combine": heads * self.length * 16 / bandwidth,
            "select": heads * self.length * 8 / bandwidth,
            "remember": heads * self.keep * 5 / bandwidth,
            "move": moved / bandwidth,
        }

    def torch_round(self, request: int) -> None:
        """The same round for one request in plain torch, on gathered keys."""
        size, page_size = self.arguments.head_size, self.arguments.page_size
        source = self.batch.source_pages[request].long()
        target = self.batch.target_pages[request].long()
        gathered = torch.stack([layer[source] for layer in self.kv.layers])  # [L, pages, H, page size, 2 D]
        tokens = gathered.transpose(1, 2).flatten(2, 3)[:, :, : self.length]
        scores = tiled.rkv_scores(
            self.queries[:, request].transpose(1, 2),
            tokens[..., :size],
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
        for layer, data in zip(self.kv.layers, moved, strict=True):
            layer[target] = data


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def time_stages(setup: Setup, repetitions: int) -> dict[str, float]:
    """Median milliseconds a request of each stage and of the whole round."""
    calls = setup.stages()
    parts = len(calls["survey"])
    samples: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "round")}
    for repetition in range(repetitions + 2):
        marks = [[event() for _ in range(len(STAGES) + 1)] for _ in range(parts)]
        torch.cuda._sleep(4_000_000)  # the host enqueues everything in the meantime
        for part in range(parts):
            marks[part][0].record()
            for index, stage in enumerate(STAGES):
                calls[stage][part]()
                marks[part][index + 1].record()
        torch.cuda.synchronize()
        if repetition < 2:
            continue
        for index, stage in enumerate(STAGES):
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
    arguments: argparse.Namespace, ceilings: Ceilings, length: int, keep: int
) -> list[dict[str, object]]:
    """Two rows a kind of keys for one length: a request's first round, and a later one."""
    rows: list[dict[str, object]] = []
    for keys, shift in SHIFTS.items():
        setup = Setup(arguments, ceilings, length, keep, shift)
        setup.round.warm_up(setup.queries)
        rows.append({"keys": keys, "round": "first", **measure_round(setup)})
        setup.go_on()
        rows.append({"keys": keys, "round": "later", **measure_round(setup)})
        del setup
        torch.cuda.empty_cache()
    return rows


def measure_round(setup: Setup) -> dict[str, object]:
    arguments = setup.arguments
    setup.round.run(setup.queries, setup.batch, setup.lam)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    setup.round.run(setup.queries, setup.batch, setup.lam)
    torch.cuda.synchronize()
    beyond_scratch = torch.cuda.max_memory_allocated() - before
    whole = time_call(partial(setup.round.run, setup.queries, setup.batch, setup.lam), 5)
    times, floors = time_stages(setup, arguments.repetitions), setup.floors()
    return {
        "length": setup.length,
        "keep": setup.keep,
        "milliseconds_per_request": times,
        "call_milliseconds_per_request": whole / arguments.requests,
        "floor_milliseconds_per_request": floors,
        "floor_of_round": sum(floors.values()),
        "ratio_to_floor": times["round"] / sum(floors.values()),
        "parts": len(setup.stages()["survey"]),
        "scratch_bytes": setup.round._scratch.numel(),
        "bytes_beyond_scratch": beyond_scratch,
        "torch_milliseconds_per_request": time_call(partial(setup.torch_round, 0), 2),
    }


def show(row: dict[str, object]) -> None:
    times, floors = row["milliseconds_per_request"], row["floor_milliseconds_per_request"]
    assert isinstance(times, dict) and isinstance(floors, dict)
    stages = "  ".join(f"{stage} {times[stage]:.3f} ({floors[stage]:.3f})" for stage in STAGES)
    print(
        f"N {row['length']:>5} keep {row['keep']:>5} {row['keys']:<13} {row['round']} "
        f"round {times['round']:.3f} ms a request, floor {row['floor_of_round']:.3f}, "
        f"ratio {row['ratio_to_floor']:.2f}, call {row['call_milliseconds_per_request']:.3f}, "
        f"torch {row['torch_milliseconds_per_request']}\n    {stages}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument(
        "--lengths", default="1152:1024,2176:2048,4224:4096", help="length:keep, comma separated"
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the raw numbers")
    arguments = parser.parse_args()
    device = measure_device()
    if device.ceilings is None:
        sys.exit("this benchmark needs a CUDA device")
    torch.cuda.empty_cache()
    rows = []
    for pair in arguments.lengths.split(","):
        length, keep = map(int, pair.split(":"))
        for row in measure(arguments, device.ceilings, length, keep):
            show(row)
            rows.append(row)
    if arguments.json:
        report = {
            "command": command_line("python", "benchmarks/kernels.py"),
            "device": device.model_dump(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "settings": {
                name: value for name, value in vars(arguments).items() if name not in ("json", "lengths")
            },
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
