"""`rkv-vllm bench`: tokens/s and memory against stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rkv_vllm.bench.rows import Row
from rkv_vllm.cli.options import described, given
from rkv_vllm.settings.config import PolicyName


def _load(name: str, metavar: str | None = None, prefix: str = "--") -> Any:
    return typer.Option(
        f"{prefix}{name.replace('_', '-')}",
        help=described(Row.model_fields[name]),
        metavar=metavar,
        rich_help_panel="Load",
    )


def bench(
    context: typer.Context,
    rows: Annotated[
        Path | None,
        typer.Option(help="YAML file with groups of loads, in place of the one load described here."),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Which group of --rows to run.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run these rows of the group alone.")] = None,
    models: Annotated[Path | None, typer.Option(help="Folder in which the group's model is.")] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Start nothing; show what files of results hold, those of the same engines together."
        ),
    ] = None,
    input: Annotated[int | None, _load("input", "tokens")] = None,
    output: Annotated[int | None, _load("output", "tokens")] = None,
    budget: Annotated[int | None, _load("budget", prefix="--kv-")] = None,
    buffer: Annotated[int | None, _load("buffer", prefix="--kv-")] = None,
    policy: Annotated[PolicyName | None, _load("policy", prefix="--kv-")] = None,
    concurrency: Annotated[int | None, _load("concurrency")] = None,
    backlog: Annotated[int | None, _load("backlog")] = None,
    batch: Annotated[int | None, _load("batch")] = None,
    ages: Annotated[tuple[int, int] | None, _load("ages")] = None,
    max_age: Annotated[int | None, _load("max_age")] = None,
    rkv_entry: Annotated[str | None, _load("rkv_entry")] = None,
    warmup_tokens: Annotated[int | None, _load("warmup_tokens")] = None,
    memory_gib: Annotated[
        float | None, typer.Option(help="GPU memory of an engine in GiB, whatever the GPU has.")
    ] = None,
    lives: Annotated[
        str | None, typer.Option(help="Kinds of engine in turn: stock, rkv, auto, off, stock-fp8, rkv-fp8.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the engines take turns.")] = 1,
    windows: Annotated[int, typer.Option(min=1, help="Measured windows of a load.")] = 3,
    window_seconds: Annotated[float, typer.Option(min=0.0, help="Length of a window.")] = 10.0,
    window_steps: Annotated[
        int | None, typer.Option(min=1, help="Length of a window in steps, in place of seconds.")
    ] = None,
    settle_steps: Annotated[
        int, typer.Option(min=1, help="Steps in which as many requests must run as in those before.")
    ] = 64,
    settle_seconds: Annotated[
        float, typer.Option(min=0.0, help="Seconds after which to measure even if the load is not steady.")
    ] = 20.0,
    profile: Annotated[
        int, typer.Option(min=0, help="Steps to record with torch's profiler behind the last load.")
    ] = 0,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for everything.")] = None,
    stock_arg: Annotated[
        list[str] | None, typer.Option(help="Option of vLLM for stock engines alone.")
    ] = None,
    rkv_arg: Annotated[
        list[str] | None, typer.Option(help="Option of vLLM for R-KV's engines alone.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="File for the results, written after each engine.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="File for what the engines print.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots (SVG); needs matplotlib.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print comparisons as JSON instead of tables.")
    ] = False,
) -> None:
    """Measure R-KV against stock vLLM: `rkv-vllm bench MODEL` and any option of `vllm serve`.

    Each engine runs in processes of its own, one after another, under the same load. See benchmarks/README.md
    for what is measured and for the published runs.
    """
    from rkv_vllm.bench import command
    from rkv_vllm.bench.results import Measure

    load = given(
        input=input,
        output=output,
        budget=budget,
        buffer=buffer,
        policy=policy,
        concurrency=concurrency,
        backlog=backlog,
        batch=batch,
        ages=ages,
        max_age=max_age,
        rkv_entry=rkv_entry,
        warmup_tokens=warmup_tokens,
    )
    try:
        if report:
            command.show_files(report, json, plots)
            return
        chosen = command.choose(
            rows,
            group,
            only or [],
            models,
            load,
            memory_gib=memory_gib,
            lives=lives,
            stock_engine=stock_arg or [],
            rkv_engine=rkv_arg or [],
        )
        measure = Measure(
            windows=windows,
            window_seconds=window_seconds,
            window_steps=window_steps,
            settle_steps=settle_steps,
            settle_seconds=settle_seconds,
            profile_steps=profile,
        )
        measured = command.measure(
            chosen,
            measure,
            extra=context.args,
            rounds=rounds,
            time_limit=time_limit,
            log=log,
            save=save,
            title=group or "bench",
            as_json=json,
            plots=plots,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(0 if measured else 1)
