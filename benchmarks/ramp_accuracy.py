"""How often answers are right under a ramp of load, in a pool that is too small for its upper levels.

    python benchmarks/ramp_accuracy.py derivation --model PATH --seed 2026 --kv-budget auto:24% \\
        --levels 16,48,80,160,400,160,80,48,16 --num-gpu-blocks-override 6000 --out auto.json

One setting an engine: `full`, which is what stock vLLM does, preemptions included, a fixed budget, or budget
"auto". Percentages are of a whole problem's tokens. Each level is a closed loop with so many requests in
flight, whose ages are spread evenly, as on a server that has run for long; levels follow each other without a
gap. A level's own problems, the same for all settings, come once the load has settled, in about the time of
one answer, and others keep it up until the last of them is answered. Other options go to the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from accuracy import STUDIES

from rkv_vllm.evaluation.answers import Answer
from rkv_vllm.evaluation.engines import ProcessEngine, Sampling, check_in_force, in_process
from rkv_vllm.evaluation.runner import Job, judge
from rkv_vllm.evaluation.settings import Setting, grid, parse_budgets, parse_policies
from rkv_vllm.evaluation.statistics import INTERVAL, share
from rkv_vllm.evaluation.tasks import Problem, Task, make_task
from rkv_vllm.provenance import command_line
from rkv_vllm.settings.config import RkvConfig

BUFFER = 128


@dataclass(frozen=True)
class Reading:
    """Of vLLM's counters, at a moment."""

    seconds: float
    tokens: float
    preemptions: float

    @classmethod
    def now(cls) -> Reading:
        from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

        values = {each.name: each.value for each in get_metrics_snapshot() if isinstance(each, Counter)}
        return cls(time.monotonic(), values["vllm:generation_tokens"], values["vllm:num_preemptions"])


class ClosedLoop:
    """Keeps a number of requests in flight: whenever an answer comes, the next problem is asked."""

    def __init__(
        self, engine: ProcessEngine, setting: Setting, task: Task, seed: int, group: asyncio.TaskGroup
    ) -> None:
        self._engine, self._setting, self._task, self._group = engine, setting, task, group
        self._fillers = random.Random(f"{seed} fillers")
        self._to_judge: deque[Problem] = deque()
        self._answers: list[Answer] = []
        self._workers: list[asyncio.Task[None]] = []
        self._level = self._running = self._ended = 0
        self._came = asyncio.Event()

    async def level(
        self, requests: int, problems: Sequence[Problem]
    ) -> tuple[list[Answer], Reading, Reading]:
        """Answers to the problems, in their order, and counters before and after."""
        settled = self._ended + max(requests, self._level)
        new, self._level = requests - self._level, requests
        assert self._task.max_tokens is not None
        for place in range(1, new + 1):
            # Its first request ends early, so that those behind it have another age than everybody's.
            first = max(self._task.max_tokens * place // new, 1)
            self._workers.append(self._group.create_task(self._work(first)))
            self._running += 1
        await self._until(lambda: self._ended >= settled)
        before = Reading.now()
        self._answers.clear()
        self._to_judge.extend(problems)
        await self._until(lambda: len(self._answers) == len(problems))
        return sorted(self._answers, key=lambda answer: int(answer.problem)), before, Reading.now()

    def stop(self) -> None:
        for worker in self._workers:
            worker.cancel()

    async def _work(self, first: int) -> None:
        await self._ask(self._filler(), first)
        while self._running <= self._level:
            if self._to_judge:
                self._answers.append(await self._ask(self._to_judge.popleft(), None))
            else:
                await self._ask(self._filler(), None)
        self._running -= 1

    async def _ask(self, problem: Problem, max_tokens: int | None) -> Answer:
        generation = await self._engine.generate(
            problem.prompt, self._setting, 0, self._task.decode, max_tokens=max_tokens
        )
        check_in_force(self._setting, generation)
        self._ended += 1
        self._came.set()
        return judge(Job(self._setting, problem, 0), generation, self._task)

    def _filler(self) -> Problem:
        [problem] = self._task.problems(1, self._fillers.getrandbits(62))
        return problem

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._came.clear()
            await self._came.wait()


def row_of(requests: int, answers: Sequence[Answer], before: Reading, after: Reading) -> dict[str, Any]:
    """A level in numbers; `full_cache_tokens`: mean length up to which nothing was lost, of those that
    switched."""
    seconds = after.seconds - before.seconds
    right = share([[answer.right] for answer in answers])
    switched = [answer.full_cache_tokens for answer in answers if answer.full_cache_tokens is not None]
    return {
        "requests": requests,
        "problems": len(answers),
        "right": right._asdict(),
        "truncated": fmean(answer.truncated for answer in answers),
        "seconds": round(seconds, 2),
        "tokens_per_second": round((after.tokens - before.tokens) / seconds, 1),
        "preemptions": int(after.preemptions - before.preemptions),
        "never_compacted": fmean(answer.compactions == 0 for answer in answers),
        "full_cache_tokens": round(fmean(switched), 1) if switched else None,
        "evicted_tokens": round(fmean(answer.evicted_tokens for answer in answers), 1),
        "by_problem": "".join("01"[answer.right] for answer in answers),  # to compare in pairs
    }


async def measure(arguments: argparse.Namespace, engine_arguments: list[str], setting: Setting) -> None:
    task = make_task(arguments.task, {})
    levels = [int(word) for word in arguments.levels.split(",")]
    options = ["--max-model-len", "2304", "--max-num-seqs", str(max(levels)), *engine_arguments]
    result: dict[str, Any] = {
        "command": command_line("python", "benchmarks/ramp_accuracy.py"),
        "task": task.describe(),
        "setting": setting.name,
        "seed": arguments.seed,
        "interval": INTERVAL,
        "levels": [],
    }
    sampling = Sampling(0.0, 1.0, task.max_tokens, chat=False)
    async with in_process(arguments.model, options, RkvConfig(), sampling, with_metrics=True) as engine:
        result["engine"] = engine.facts
        async with asyncio.TaskGroup() as group:
            loop = ClosedLoop(engine, setting, task, arguments.seed, group)
            for place, requests in enumerate(levels):
                seed = random.Random(f"{arguments.seed} {place}").getrandbits(62)
                found = await loop.level(requests, task.problems(arguments.problems_per_level, seed))
                row = row_of(requests, *found)
                result["levels"].append(row)
                print(json.dumps({name: row[name] for name in row if name != "by_problem"}), flush=True)
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            loop.stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["derivation", "program"])
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--levels", default="16,48,80,160,400,160,80,48,16", help="requests in flight")
    parser.add_argument("--problems-per-level", type=int, default=400)
    parser.add_argument("--kv-budget", required=True, help="one of those that `rkv-vllm eval` takes")
    parser.add_argument("--kv-policy", default="invariant")
    parser.add_argument("--seed", type=int, required=True, help="of the problems")
    parser.add_argument("--out", type=Path, required=True, help="the result, as JSON")
    arguments, engine_arguments = parser.parse_known_args()
    budgets, policies = parse_budgets(arguments.kv_budget), parse_policies(arguments.kv_policy)
    settings = grid(budgets, policies, [BUFFER], [0], STUDIES[arguments.task].length)
    if len(settings) > 2:
        parser.error("one budget and one policy make the setting of an engine")
    asyncio.run(measure(arguments, engine_arguments, settings[-1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
