"""What a round of a very long request takes of a GPU: scratch memory, memory in the step, and time.

    python benchmarks/long_requests.py --out long_requests.json

One layer of 8 KV heads and 32 query heads of size 128 in bfloat16, pages of 16 tokens, one request that keeps
1,024 tokens. Memory is what torch's allocator counts beside the cache, the highest moment of the round less
the moment before it; times are medians by CUDA events.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rkv_vllm.execution.gpu.paged_keys import PagedKeys
from rkv_vllm.kernels.batch import CompactionBatch, QueryWindow
from rkv_vllm.kernels.cache_layout import PagedKV
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.rkv_scorer import RkvScorer
from rkv_vllm.kernels.scorer import GivenScores
from rkv_vllm.kernels.select import select
from rkv_vllm.policies import Policy, ScoreInputs, make_policies
from rkv_vllm.provenance import command_line
from rkv_vllm.settings.config import WINDOW, RkvConfig

HEADS, GROUP, SIZE, PAGE, KEEP = 8, 4, 128, 16, 1024
LENGTHS = (4_096, 16_384, 131_072, 400_000)
LENGTHS_OF_SELECTION = (1_152, 16_384, 131_072, 1_048_576)
REPETITIONS = 5


def make_batch(length: int) -> CompactionBatch:
    pages = range(-(-length // PAGE))
    return CompactionBatch.build(
        lengths=[length],
        keeps=[KEEP],
        source_pages=[pages],
        target_pages=[pages[: KEEP // PAGE]],
        queries=[QueryWindow(0, length, WINDOW)],
        page_size=PAGE,
        device="cuda",
    )


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds, and MiB beyond what was held before; the first run compiles."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": round(statistics.median(times), 3), "mib_in_step": round(peak / 2**20, 1)}


def measure_length(length: int) -> dict[str, Any]:
    layer = torch.randn(length // PAGE + 2, HEADS, PAGE, 2 * SIZE, dtype=torch.bfloat16, device="cuda")
    queries = torch.randn(1, 1, WINDOW, HEADS * GROUP, SIZE, dtype=torch.bfloat16, device="cuda")
    kv, batch = PagedKV([layer]), make_batch(length)
    rounds, factors = CompactionRound(kv, longest=length), kv.equal_factors(SIZE**-0.5)
    found: dict[str, Any] = {"tokens": length, "scratch_mib": round(rounds.scratch.num_bytes / 2**20, 1)}
    for name, lam in (("rkv", 0.1), ("snapkv", 1.0)):
        weight = torch.tensor([lam], device="cuda")
        found[name] = measure(partial(rounds.run, RkvScorer(queries, factors, weight), batch))
    for name in ("keydiff", "recency", "random"):
        policy = make_policies(RkvConfig())[name]
        keys = PagedKeys(layer[..., :SIZE], batch.source_pages[0], length)
        inputs = ScoreInputs(keys, None, 1.0, 0, length)
        score = partial(score_only_layer, policy, inputs)
        found[name] = measure(partial(rounds.run, GivenScores(score), batch))
    return found


def score_only_layer(policy: Policy, inputs: ScoreInputs, layer: int) -> torch.Tensor:
    return policy.scores(inputs).unsqueeze(0)


def measure_selection(length: int) -> dict[str, Any]:
    layer = torch.zeros(length // PAGE + 2, HEADS, PAGE, 2 * SIZE, dtype=torch.bfloat16, device="cuda")
    rounds = CompactionRound(PagedKV([layer]), scratch_bytes=1 << 30)
    work = next(rounds.slices(make_batch(length)))
    work.scores_by_head.normal_()
    return {"tokens": length, **measure(partial(select, work, work.scores_by_head, window=WINDOW))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = {
        "command": command_line("python", "benchmarks/long_requests.py"),
        "device": torch.cuda.get_device_name(),
        "rounds": [measure_length(length) for length in LENGTHS],
        "selection": [measure_selection(length) for length in LENGTHS_OF_SELECTION],
    }
    arguments.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
