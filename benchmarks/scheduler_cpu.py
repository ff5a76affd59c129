"""Time the scheduler's CPU work in a step of running requests, against stock vLLM's.

vLLM's real scheduler and ours, without a model: N requests decode side by side, and a made-up model answers
each step with one token a request. Three engines take turns, each for one buffer's length of steps, so that
in a turn every request with a budget is compacted exactly once:

    stock   vLLM's own scheduler
    off     ours, every request with its full cache
    on      ours, every request on the budget; compactions are spread evenly over the steps

All requests have different prompts, and the pool is never short. For each seed the engines are built anew:
how their objects happen to lie in memory is worth some per cent. Times are CPU time of the one thread, in
microseconds a step; `update` is `update_from_output`, of which `make_stats` is a part, and `pickle` is of the
SchedulerOutput with its plan, as it is sent to workers in other processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from rkv_vllm.block_manager import CompactingSpec
from rkv_vllm.plan import plan_of
from rkv_vllm.provenance import command_line
from rkv_vllm.scheduler import CompactingAsyncScheduler, CompactingScheduler

ENGINES = ("stock", "off", "on")
PHASES = ("schedule", "update", "make_stats", "pickle")
VOCABULARY = 32_000


def model_config(max_model_len: int) -> ModelConfig:
    """Of a model that exists as a configuration file only."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "float32",
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(settings))
        return ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max_model_len,
        )


class Engine:
    """vLLM's engine core in small, timed: a scheduler, one or two steps in flight, and a made-up model."""

    def __init__(self, name: str, num_requests: int, seed: int, arguments: argparse.Namespace) -> None:
        self.microseconds: Counter[str] = Counter()
        self.compactions = 0
        self._depth = 1 if arguments.sync else 2
        self._in_flight: deque[SchedulerOutput] = deque()
        # The prompt, the warm-up and all turns, and some steps in flight.
        length = arguments.budget + (arguments.repetitions + 3) * arguments.buffer
        self.scheduler = _scheduler(name, num_requests, length, arguments)
        self._timed_make_stats()
        random_ = random.Random(seed)
        hasher = get_request_block_hasher(arguments.page_size, sha256)
        phases = [index * arguments.buffer // num_requests for index in range(num_requests)]
        random_.shuffle(phases)
        for index, phase in enumerate(phases):
            request = Request(
                request_id=f"cmpl-{random_.getrandbits(128):032x}-{index}",
                prompt_token_ids=random_.choices(range(VOCABULARY), k=arguments.budget + phase),
                sampling_params=SamplingParams(max_tokens=length, ignore_eos=True),
                pooling_params=None,
                block_hasher=hasher,
            )
            self.scheduler.add_request(request)

    def _timed_make_stats(self) -> None:
        make_stats = self.scheduler.make_stats
        self.scheduler.make_stats = lambda *args, **kwargs: self._timed(  # type: ignore[method-assign]
            "make_stats", make_stats, *args, **kwargs
        )

    def _timed(self, phase: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time_ns()
        result = call(*args, **kwargs)
        self.microseconds[phase] += (time.thread_time_ns() - started) / 1000
        return result

    def run(self, steps: int) -> dict[str, float]:
        """Microseconds a step of each phase."""
        self.microseconds.clear()
        self.compactions = 0
        for _ in range(steps):
            output = self._timed("schedule", self.scheduler.schedule)
            self._timed("pickle", pickle.dumps, output, pickle.HIGHEST_PROTOCOL)
            self.compactions += len(plan_of(output).compactions)
            self._in_flight.append(output)
            if len(self._in_flight) == self._depth:
                oldest = self._in_flight.popleft()
                self._timed("update", self.scheduler.update_from_output, oldest, _answer(oldest))
        return {phase: self.microseconds[phase] / steps for phase in PHASES}


def _scheduler(name: str, num_requests: int, max_model_len: int, arguments: argparse.Namespace) -> Scheduler:
    page_size, budget, buffer = arguments.page_size, arguments.budget, arguments.buffer
    pages = 1 + num_requests * (cdiv(max_model_len, page_size) + 1)
    cache_config = CacheConfig(block_size=page_size, enable_prefix_caching=True)
    cache_config.num_gpu_blocks = pages
    rkv = {"off": {}, "on": {"budget": budget, "buffer": buffer}}
    vllm_config = VllmConfig(
        model_config=model_config(max_model_len),
        cache_config=cache_config,
        scheduler_config=SchedulerConfig(
            max_num_seqs=num_requests,
            max_num_batched_tokens=num_requests * max_model_len,  # all prompts in the first step
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
        ),
        additional_config={} if name == "stock" else {"rkv": rkv[name]},
    )
    vllm_config.scheduler_config.async_scheduling = not arguments.sync  # the CPU platform turns it off
    spec_class = FullAttentionSpec if name == "stock" else CompactingSpec
    spec = spec_class(block_size=page_size, num_kv_heads=1, head_size=8, dtype=torch.float32)
    if name == "stock":
        scheduler_class: type[Scheduler] = Scheduler if arguments.sync else AsyncScheduler
    else:
        scheduler_class = CompactingScheduler if arguments.sync else CompactingAsyncScheduler
    scheduler = scheduler_class(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=page_size,
        log_stats=True,
    )
    scheduler.use_v2_model_runner = True  # as on a GPU
    return scheduler


def _answer(output: SchedulerOutput) -> ModelRunnerOutput:
    request_ids = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=request_ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
        sampled_token_ids=[[index % VOCABULARY] for index in range(len(request_ids))],
    )


def measure(num_requests: int, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Each engine's turns, and what they come to."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    task = progress.add_task(f"{num_requests} requests", total=len(arguments.seeds) * arguments.repetitions)
    for seed in arguments.seeds:
        engines = {name: Engine(name, num_requests, seed, arguments) for name in ENGINES}
        for engine in engines.values():
            engine.run(arguments.buffer + 1)  # prompts, and each request's first compaction
        gc.collect()
        gc.freeze()  # as vLLM's engine core does when it is up
        for repetition in range(arguments.repetitions):
            for index in range(len(ENGINES)):  # each goes first as often as the others
                name = ENGINES[(repetition + index) % len(ENGINES)]
                turns[name].append(engines[name].run(arguments.buffer))
            progress.advance(task)
        gc.unfreeze()
        assert engines["on"].compactions == num_requests and engines["off"].compactions == 0
    for of_engine in turns.values():
        for turn in of_engine:
            turn["schedule + update"] = turn["schedule"] + turn["update"]
    columns = (*PHASES, "schedule + update")
    return {
        "requests": num_requests,
        "compactions_a_step": num_requests / arguments.buffer,
        "microseconds": {
            name: {column: round(statistics.median(t[column] for t in of_engine), 1) for column in columns}
            for name, of_engine in turns.items()
        },
        "ratio_to_stock": {
            name: {column: round(_ratio(turns[name], turns["stock"], column), 4) for column in columns}
            for name in ENGINES[1:]
        },
        "turns": {
            name: [{column: round(value, 1) for column, value in turn.items()} for turn in of_engine]
            for name, of_engine in turns.items()
        },
    }


def _ratio(ours: list[dict[str, float]], stock: list[dict[str, float]], column: str) -> float:
    """Median over pairs of neighbouring turns: what slows the machine down slows both."""
    return statistics.median(a[column] / b[column] for a, b in zip(ours, stock, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5, help="turns a seed (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sync", action="store_true", help="the schedulers without async scheduling")
    parser.add_argument("--json", type=Path, help="where to write the raw numbers")
    arguments = parser.parse_args()
    init_none_hash(sha256)
    columns = ("schedule", "update", "make_stats", "pickle")
    table = Table("requests", "engine", *columns, "schedule + update", "ratio", title="microseconds a step")
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for num_requests in arguments.requests:
            row = measure(num_requests, arguments, progress)
            rows.append(row)
            for name in ENGINES:
                times = row["microseconds"][name]
                ratio = row["ratio_to_stock"].get(name, {"schedule + update": 1})["schedule + update"]
                shown = [f"{times[column]:,.0f}" for column in (*columns, "schedule + update")]
                table.add_row(f"{num_requests:,}", name, *shown, f"{ratio:.3f}")
    Console().print(table)
    if arguments.json:
        command = command_line("python", "benchmarks/scheduler_cpu.py")
        result = {"command": command, "python": sys.version.split()[0], "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
