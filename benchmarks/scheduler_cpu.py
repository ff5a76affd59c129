"""Time the scheduler's CPU work in a step of running requests, against stock vLLM's.

vLLM's real scheduler and ours, without a model: N requests decode side by side, and a made-up model answers
each step with one token a request. Four engines take turns, each for one buffer's length of steps, so that
in a turn every request with a budget is compacted exactly once:

    stock   vLLM's own scheduler
    off     ours, every request with its full cache
    on      ours, every request on the budget; compactions are spread evenly over the steps
    auto    ours, every request with its full cache because memory is never short: what looking costs

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
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm.utils.math_utils import cdiv

from rkv_vllm.bench.modelless import VOCABULARY, ModellessEngine
from rkv_vllm.decisions.messages import plan_of
from rkv_vllm.provenance import command_line

ENGINES = ("stock", "off", "on", "auto")
#: Phase -> the scheduler's method.
METHODS = {"schedule": "schedule", "update": "update_from_output", "make_stats": "make_stats"}
PHASES = (*METHODS, "pickle")
COLUMNS = (*PHASES, "schedule + update")


class TimedEngine:
    """One whose scheduler's methods are timed."""

    def __init__(self, name: str, num_requests: int, seed: int, arguments: argparse.Namespace) -> None:
        self.microseconds: Counter[str] = Counter()
        self.compactions = 0
        page_size, budget, buffer = arguments.page_size, arguments.budget, arguments.buffer
        # The prompt, the warm-up and all turns, and some steps in flight.
        length = budget + (arguments.repetitions + 3) * buffer
        rkv: dict[str, dict[str, Any] | None] = {
            "stock": None,
            "off": {},
            "on": {"budget": budget, "buffer": buffer},
            "auto": {"budget": "auto", "min_budget": budget, "buffer": buffer},
        }
        self._engine = ModellessEngine(
            rkv[name],
            pages=num_requests * (cdiv(length, page_size) + 1),
            page_size=page_size,
            max_num_seqs=num_requests,
            max_num_batched_tokens=num_requests * length,  # all prompts in the first step
            max_model_len=length,
            asynchronous=not arguments.sync,
        )
        for phase, method in METHODS.items():
            call = getattr(self._engine.scheduler, method)
            setattr(self._engine.scheduler, method, partial(self._timed, phase, call))
        random_ = random.Random(seed)
        phases = [index * buffer // num_requests for index in range(num_requests)]
        random_.shuffle(phases)
        for index, phase in enumerate(phases):
            request_id = f"cmpl-{random_.getrandbits(128):032x}-{index}"
            self._engine.add(request_id, random_.choices(range(VOCABULARY), k=budget + phase), length)

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
            output = self._engine.schedule()
            self._timed("pickle", pickle.dumps, output, pickle.HIGHEST_PROTOCOL)
            self.compactions += len(plan_of(output).rounds)
            self._engine.update()
        return {phase: self.microseconds[phase] / steps for phase in PHASES}


def measure(num_requests: int, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Each engine's turns, and what they come to."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
    task = progress.add_task(f"{num_requests} requests", total=len(arguments.seeds) * arguments.repetitions)
    for seed in arguments.seeds:
        engines = {name: TimedEngine(name, num_requests, seed, arguments) for name in ENGINES}
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
        compactions = {name: engine.compactions for name, engine in engines.items()}
        assert compactions == {"stock": 0, "off": 0, "on": num_requests, "auto": 0}
    for of_engine in turns.values():
        for turn in of_engine:
            turn["schedule + update"] = turn["schedule"] + turn["update"]
    return {
        "requests": num_requests,
        "compactions_a_step": num_requests / arguments.buffer,
        "microseconds": {
            name: {column: round(statistics.median(t[column] for t in of_engine), 1) for column in COLUMNS}
            for name, of_engine in turns.items()
        },
        "ratio_to_stock": {
            name: {column: round(_ratio(turns[name], turns["stock"], column), 4) for column in COLUMNS}
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
    table = Table("requests", "engine", *COLUMNS, "ratio", title="microseconds a step")
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for num_requests in arguments.requests:
            row = measure(num_requests, arguments, progress)
            rows.append(row)
            for name in ENGINES:
                times = row["microseconds"][name]
                ratio = row["ratio_to_stock"].get(name, {"schedule + update": 1})["schedule + update"]
                shown = [f"{times[column]:,.0f}" for column in COLUMNS]
                table.add_row(f"{num_requests:,}", name, *shown, f"{ratio:.3f}")
    Console().print(table)
    if arguments.json:
        command = command_line("python", "benchmarks/scheduler_cpu.py")
        result = {"command": command, "python": sys.version.split()[0], "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
