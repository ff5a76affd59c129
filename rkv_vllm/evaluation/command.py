"""`rkv-vllm eval` from its settings to its files."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rkv_vllm.evaluation import report
from rkv_vllm.evaluation.answers import AnswerLog
from rkv_vllm.evaluation.engines import Engine, Sampling, in_process, on_server
from rkv_vllm.evaluation.plot import draw
from rkv_vllm.evaluation.run_file import RunFile, RunSettings
from rkv_vllm.evaluation.runner import Plan, run
from rkv_vllm.evaluation.settings import Setting
from rkv_vllm.evaluation.summary import Summary, rows_of
from rkv_vllm.evaluation.tasks import Task
from rkv_vllm.settings.config import RkvConfig


@dataclass(frozen=True)
class Evaluation:
    """A run as it was asked for. `base_url` None: vLLM in this process, with `engine_arguments`;
    `full_length` None: measured, where it is needed."""

    model: str | None
    base_url: str | None
    engine_arguments: Sequence[str]
    config: RkvConfig
    task: Task
    plan: Plan
    sampling: Sampling
    full_length: float | None
    command: str
    out: Path

    @property
    def run_settings(self) -> RunSettings:
        return RunSettings(
            model=self.model,
            task=self.task.describe(),
            seed=self.plan.seed,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_tokens,
            chat=self.sampling.chat,
            engine="process" if self.base_url is None else "server",
            engine_arguments=list(self.engine_arguments),
            server_wide=self.config.model_dump(exclude_unset=True),
        )

    def engine(self) -> AbstractAsyncContextManager[Engine]:
        if self.base_url is not None:
            return on_server(self.base_url, self.model, self.sampling)
        assert self.model is not None
        return in_process(self.model, list(self.engine_arguments), self.config, self.sampling)


def evaluate(asked: Evaluation, console: Console) -> Summary:
    """Runs, or goes on with, an evaluation, and writes its files into `asked.out`.

    Raises: ValueError for settings that are wrong, or not those of the run that is there; EngineError.
    """
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "run.json"
    log = AnswerLog(asked.out / "answers.jsonl")
    try:
        run_file = RunFile.begin(path, asked.run_settings, asked.command, goes_on=len(log) > 0)
        if asked.full_length is not None:
            if run_file.full_length not in (None, asked.full_length):
                raise ValueError(f"full-length: {path} has {run_file.full_length}, not {asked.full_length}")
            run_file.full_length = asked.full_length
            run_file.write(path)

        def keep_length(length: float) -> None:
            run_file.full_length = length
            run_file.write(path)
            console.print(f"Mean length with the full cache: {length:,.1f} tokens.")

        settings, facts = asyncio.run(_run(asked, log, run_file, keep_length, console))
        gc.collect()  # vLLM's engine, part of a cycle, complains if Python ends before it does
        summary = _summary(asked, run_file, log, settings, facts)
    finally:
        log.close()
    (asked.out / "summary.json").write_text(summary.model_dump_json(indent=1) + "\n")
    write_report([summary], asked.out)
    return summary


def write_report(summaries: Sequence[Summary], folder: Path) -> None:
    """Table and plot, as `table.md` and `plot.svg`."""
    (folder / "table.md").write_text(report.markdown(summaries))
    draw(summaries, folder / "plot.svg")


def merge(folders: Sequence[Path], out: Path | None) -> Merged:
    """Reads the summaries of several runs; with `out`, writes one table, one plot and `runs.json` there.

    Raises: OSError, ValueError for a folder without a summary.
    """
    merged = Merged(runs=[Summary.read(folder) for folder in folders])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "runs.json").write_text(merged.model_dump_json(indent=1) + "\n")
        write_report(merged.runs, out)
    return merged


class Merged(BaseModel):
    """Several runs in one file."""

    runs: list[Summary]


async def _run(
    asked: Evaluation,
    log: AnswerLog,
    run_file: RunFile,
    keep_length: Callable[[float], None],
    console: Console,
) -> tuple[list[Setting], dict[str, Any]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    async with asked.engine() as engine:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("answers")
            settings = await run(
                engine,
                asked.task,
                asked.plan,
                log,
                run_file.full_length,
                keep_length,
                lambda total, done: progress.update(bar, total=total, completed=done),
            )
        return settings, engine.facts


def _summary(
    asked: Evaluation, run_file: RunFile, log: AnswerLog, settings: list[Setting], facts: dict[str, Any]
) -> Summary:
    names = [problem.name for problem in asked.task.problems(asked.plan.problems, asked.plan.seed)]
    samples = asked.plan.samples
    rows = rows_of(settings, lambda setting: log.of(setting.name, names, samples))
    summary = Summary(
        commands=run_file.commands,
        settings=run_file.settings,
        engine=facts if asked.base_url is None else {"base_url": asked.base_url, **facts},
        problems=len(names),
        samples=samples,
        full_length=run_file.full_length,
        rows=rows,
        warnings=[],
    )
    summary.warnings = report.warnings_of(report.lines_of([summary]))
    return summary
