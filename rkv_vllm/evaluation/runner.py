"""Asks an engine everything, all settings mixed, and keeps what was not asked before."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rkv_vllm.evaluation.answers import Answer, AnswerLog
from rkv_vllm.evaluation.engines import Engine, Generation, check_in_force
from rkv_vllm.evaluation.settings import FULL_CACHE, Budget, Protect, Setting, grid
from rkv_vllm.evaluation.summary import full_length
from rkv_vllm.evaluation.tasks import Problem, Task
from rkv_vllm.evaluation.thinking import after_thinking
from rkv_vllm.settings.config import PolicyName

#: Called with the number of answers asked for in all, and with how many of them are there.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to compare, and on how much. `concurrency`: requests in flight."""

    budgets: Sequence[Budget]
    policies: Sequence[PolicyName]
    buffers: Sequence[int]
    protects: Sequence[Protect]
    problems: int
    samples: int
    seed: int
    concurrency: int

    def settings(self, length: float) -> list[Setting]:
        """`length`: mean with the full cache, in tokens.

        Raises: ValueError for a percentage that is no larger than the window.
        """
        return grid(self.budgets, self.policies, self.buffers, self.protects, length)

    @property
    def needs_length(self) -> bool:
        return any(budget.is_percent for budget in self.budgets)


@dataclass(frozen=True)
class Job:
    setting: Setting
    problem: Problem
    sample: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.setting.name, self.problem.name, self.sample

    def seed(self, seed: int) -> int:
        """The same in every setting, so that settings differ in their caches alone; below 2**31."""
        text = f"{seed}:{self.problem.name}:{self.sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


async def run(
    engine: Engine,
    task: Task,
    plan: Plan,
    log: AnswerLog,
    length: float | None,
    on_length: Callable[[float], None],
    on_progress: OnProgress,
) -> list[Setting]:
    """Asks what `log` does not hold yet, and returns the settings.

    Where budgets are in percent and `length`, the mean with the full cache, is None, the full cache is
    measured first, and `on_length` is told.

    Raises: EngineError; ValueError for a percentage that is no larger than the window.
    """
    problems = task.problems(plan.problems, plan.seed)
    cells = len(plan.budgets) * len(plan.policies) * len(plan.buffers) * len(plan.protects) + 1
    if plan.needs_length and length is None:
        await _ask_all(
            engine, task, plan, log, jobs([FULL_CACHE], problems, plan.samples), cells, on_progress
        )
        length = full_length(log.of(FULL_CACHE.name, (each.name for each in problems), plan.samples))
        on_length(length)
    settings = plan.settings(length or 0)
    await _ask_all(engine, task, plan, log, jobs(settings, problems, plan.samples), 1, on_progress)
    return settings


def jobs(settings: Iterable[Setting], problems: Iterable[Problem], samples: int) -> list[Job]:
    """All settings of a problem one after the other: whatever is in flight is a mixture of them."""
    return [
        Job(setting, problem, sample)
        for sample in range(samples)
        for problem in problems
        for setting in settings
    ]


async def _ask_all(
    engine: Engine,
    task: Task,
    plan: Plan,
    log: AnswerLog,
    asked: list[Job],
    scale: int,
    on_progress: OnProgress,
) -> None:
    """`scale`: the whole run's answers for one of `asked`, for the progress."""
    total, left = scale * len(asked), [job for job in asked if job.key not in log]
    done = len(asked) - len(left)
    on_progress(total, done)

    async def work(waiting: Iterator[Job]) -> None:
        nonlocal done
        for job in waiting:
            generation = await engine.generate(
                job.problem.prompt, job.setting, job.seed(plan.seed), task.decode
            )
            check_in_force(job.setting, generation)
            log.add(judge(job, generation, task))
            done += 1
            on_progress(total, done)

    waiting = iter(left)
    workers = [asyncio.create_task(work(waiting)) for _ in range(min(plan.concurrency, len(left)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def judge(job: Job, generation: Generation, task: Task) -> Answer:
    """Right or wrong; an answer that was cut off, or whose thinking never ended, is wrong.

    Where the task judges the thinking itself, its end does not matter.
    """
    answer = after_thinking(generation.output, task.opens_thinking or generation.opened_thinking)
    if task.judges_thinking:
        right = job.problem.is_right(generation.output)
    else:
        right = answer is not None and not generation.truncated and job.problem.is_right(answer)
    left_out = {"page_size", "sequences", "reason"}
    report: dict[str, Any] = generation.report.model_dump(exclude=left_out)
    return Answer(
        setting=job.setting.name,
        problem=job.problem.name,
        sample=job.sample,
        right=right,
        truncated=generation.truncated,
        prompt_tokens=generation.prompt_tokens,
        output_tokens=generation.output_tokens,
        answer=answer or "",
        output=generation.output,
        **report,
    )
