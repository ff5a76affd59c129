"""The command `rkv-vllm`."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from rkv_vllm import __version__
from rkv_vllm.bench.rows import Row
from rkv_vllm.config import POLICY_NAMES, Granularity, Order, PolicyName, RkvConfig, Scope
from rkv_vllm.server.operations import PREFIX, OperationSettings
from rkv_vllm.server.policy import ENVIRONMENT_PREFIX, KvPolicies, KvSettings, explain

app = typer.Typer(
    name="rkv-vllm",
    help="R-KV decode-time KV cache compression inside stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _field(name: str) -> str:
    return RkvConfig.model_fields[name].description or ""


def _setting(name: str) -> Any:
    help = f"{KvSettings.model_fields[name].description} [{ENVIRONMENT_PREFIX}{name.upper()}]"
    return typer.Option(f"--kv-{name.replace('_', '-')}", help=help, rich_help_panel="KV cache")


def _operation(name: str) -> Any:
    text = f"{OperationSettings.model_fields[name].description} [{PREFIX}{name.upper()}]"
    return typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="Operation")


def _load(name: str, metavar: str | None = None) -> Any:
    text = Row.model_fields[name].description
    return typer.Option(f"--{name.replace('_', '-')}", help=text, metavar=metavar, rich_help_panel="Load")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="All other options are vLLM's own: see `vllm serve --help=all`.",
)
def serve(
    context: typer.Context,
    kv_budget: Annotated[str | None, _setting("budget")] = None,
    kv_budget_min: Annotated[int | None, _setting("budget_min")] = None,
    kv_budget_max: Annotated[int | None, _setting("budget_max")] = None,
    kv_require_budget: Annotated[bool | None, _setting("require_budget")] = None,
    kv_buffer: Annotated[int | None, _setting("buffer")] = None,
    kv_policy: Annotated[PolicyName | None, _setting("policy")] = None,
    kv_policies: Annotated[str | None, _setting("policies")] = None,
    kv_mix_lambda: Annotated[float | None, _setting("mix_lambda")] = None,
    kv_key_policies: Annotated[Path | None, _setting("key_policies")] = None,
    kv_granularity: Annotated[Granularity | None, _setting("granularity")] = None,
    kv_scope: Annotated[Scope | None, _setting("scope")] = None,
    kv_order: Annotated[Order | None, _setting("order")] = None,
    kv_beyond_pool: Annotated[bool | None, _setting("beyond_pool")] = None,
    api_key_file: Annotated[Path | None, _operation("api_key_file")] = None,
    open_metrics: Annotated[bool | None, _operation("open_metrics")] = None,
    open_routes: Annotated[str | None, _operation("open_routes")] = None,
    limit_body_bytes: Annotated[int | None, _operation("limit_body_bytes")] = None,
    limit_max_tokens: Annotated[int | None, _operation("limit_max_tokens")] = None,
    limit_n: Annotated[int | None, _operation("limit_n")] = None,
    limit_concurrent: Annotated[int | None, _operation("limit_concurrent")] = None,
    limit_concurrent_per_key: Annotated[int | None, _operation("limit_concurrent_per_key")] = None,
    access_log: Annotated[str | None, _operation("access_log")] = None,
) -> None:
    """Run vLLM's OpenAI server with R-KV on: `rkv-vllm serve MODEL` and any option of `vllm serve`.

    A request may choose its own settings: "kv_cache": {"budget": 1024} in its body.
    """
    settings = _kv_settings(
        budget=kv_budget,
        budget_min=kv_budget_min,
        budget_max=kv_budget_max,
        require_budget=kv_require_budget,
        buffer=kv_buffer,
        policy=kv_policy,
        policies=kv_policies,
        mix_lambda=kv_mix_lambda,
        key_policies=kv_key_policies,
        granularity=kv_granularity,
        scope=kv_scope,
        order=kv_order,
        beyond_pool=kv_beyond_pool,
    )
    _operation_settings(
        api_key_file=api_key_file,
        open_metrics=open_metrics,
        open_routes=open_routes,
        limit_body_bytes=limit_body_bytes,
        limit_max_tokens=limit_max_tokens,
        limit_n=limit_n,
        limit_concurrent=limit_concurrent,
        limit_concurrent_per_key=limit_concurrent_per_key,
        access_log=access_log,
    )
    from rkv_vllm.engine_args import rkv_serve_flags
    from rkv_vllm.server.arguments import serve_arguments

    try:
        arguments = serve_arguments(context.args, rkv_serve_flags(settings.engine))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    gc.disable()  # thousands of modules are imported, none of them garbage: a seventh of the time
    from rkv_vllm.server.launch import launch

    gc.enable()
    launch(arguments)


@app.command()
def args(
    budget: Annotated[int | None, typer.Option(help=_field("budget"))] = None,
    buffer: Annotated[int | None, typer.Option(help=_field("buffer"))] = None,
    policy: Annotated[PolicyName | None, typer.Option(help=_field("policy"))] = None,
    mix_lambda: Annotated[float | None, typer.Option(help=_field("mix_lambda"))] = None,
    beyond_pool: Annotated[bool, typer.Option("--beyond-pool", help=_field("beyond_pool"))] = False,
    granularity: Annotated[Granularity | None, typer.Option(help=_field("granularity"))] = None,
    scope: Annotated[Scope | None, typer.Option(help=_field("scope"))] = None,
    order: Annotated[Order | None, typer.Option(help=_field("order"))] = None,
) -> None:
    """Print the engine options that switch R-KV on: `vllm serve MODEL $(rkv-vllm args --budget 1024)`."""
    config = _config(
        budget=budget,
        buffer=buffer,
        policy=policy,
        mix_lambda=mix_lambda,
        beyond_pool=beyond_pool,
        granularity=granularity,
        scope=scope,
        order=order,
    )
    # vLLM logs to standard output when imported, and what we print there goes onto a command line.
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    with redirect_stdout(sys.stderr):
        from rkv_vllm.engine_args import rkv_serve_flags

        flags = rkv_serve_flags(config)
    typer.echo(" ".join(flags))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="All other options are vLLM's own: see `vllm serve --help=all`.",
)
def doctor(
    context: typer.Context,
    kv_budget: Annotated[int | None, typer.Option(help=_field("budget"))] = None,
    kv_buffer: Annotated[int | None, typer.Option(help=_field("buffer"))] = None,
    kv_policy: Annotated[PolicyName | None, typer.Option(help=_field("policy"))] = None,
    kv_mix_lambda: Annotated[float | None, typer.Option(help=_field("mix_lambda"))] = None,
    kv_beyond_pool: Annotated[
        bool,
        typer.Option("--kv-beyond-pool", help=_field("beyond_pool")),
    ] = False,
    kv_granularity: Annotated[Granularity | None, typer.Option(help=_field("granularity"))] = None,
    kv_scope: Annotated[Scope | None, typer.Option(help=_field("scope"))] = None,
    kv_order: Annotated[Order | None, typer.Option(help=_field("order"))] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a request, prompt and answer; default: max_model_len.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what `rkv-vllm serve MODEL ...` would meet: versions, what is refused, how many requests fit.

    Takes the arguments of `rkv-vllm serve`, starts nothing, and exits with 1 where something is refused.
    Without a MODEL it looks at the installation alone.
    """
    config = _config(
        budget=kv_budget,
        buffer=kv_buffer,
        policy=kv_policy,
        mix_lambda=kv_mix_lambda,
        beyond_pool=kv_beyond_pool,
        granularity=kv_granularity,
        scope=kv_scope,
        order=kv_order,
    )
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from rkv_vllm.doctor import diagnose, show

    try:
        with redirect_stdout(sys.stderr):
            found = diagnose(context.args, config, length)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        from rich.console import Console

        show(found, Console())
    raise typer.Exit(1 if found.refused else 0)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="All other options are the engine's own: see `vllm serve --help=all`.",
)
def fidelity(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Directory or name of the model.")],
    text: Annotated[list[Path], typer.Option(help="Text in UTF-8; may be given several times.")],
    budgets: Annotated[str, typer.Option(help="Budgets to measure, separated by commas.")],
    policies: Annotated[str | None, typer.Option(help="Policies, separated by commas; default: all.")] = None,
    buffers: Annotated[str, typer.Option(help="Buffers, separated by commas.")] = "128",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a window that are read as a prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window that are decoded.")] = 768,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text, at most.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals' bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the result as JSON.")] = None,
    kv_mix_lambda: Annotated[float | None, typer.Option(help=_field("mix_lambda"))] = None,
    kv_granularity: Annotated[Granularity | None, typer.Option(help=_field("granularity"))] = None,
    kv_scope: Annotated[Scope | None, typer.Option(help=_field("scope"))] = None,
    kv_order: Annotated[Order | None, typer.Option(help=_field("order"))] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure what budgets change in a model's predictions of a text, against the engine's own full cache.

    The engine decodes the text itself, so that no answers are needed; compactions happen as in serving.
    """
    config = _config(
        mix_lambda=kv_mix_lambda,
        granularity=kv_granularity,
        scope=kv_scope,
        order=kv_order,
    )
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from rich.console import Console

    from rkv_vllm.evaluation.fidelity import settings_of, show

    try:
        settings = settings_of(
            config,
            _integers("--budgets", budgets),
            _integers("--buffers", buffers),
            POLICY_NAMES if policies is None else [name.strip() for name in policies.split(",")],
        )
        with redirect_stdout(sys.stderr):
            from rkv_vllm.evaluation.fidelity_run import Plan, run

            command = shlex.join(["rkv-vllm", *sys.argv[1:]])
            plan = Plan(command, model, text, settings, config, prompt, tokens, windows, seed)
            report = run(plan, context.args, Console(stderr=True))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if out is not None:
        out.write_text(report.model_dump_json(indent=1) + "\n")
    if json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        show(report, Console())


@app.command(
    "eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="All other options are vLLM's own, for the engine in this process: see `vllm serve --help=all`.",
)
def evaluate(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="`derivation`, `jsonl:FILE` or `reasoning-gym:NAME`.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; a stopped run in it goes on.")],
    model: Annotated[
        str | None, typer.Option(help="Name or folder; with --base-url a name that the server knows.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Ask this server instead of an engine in this process.")
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the task; may be repeated.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Tokens, or percent of the mean length with the full cache, as in 10%.")
    ] = "full,2048,1024,512",
    policies: Annotated[str, typer.Option(help="What scores tokens.")] = "rkv,snapkv,recency,random",
    buffers: Annotated[str, typer.Option(help="Tokens collected between two compactions.")] = "128",
    full_length: Annotated[
        float | None, typer.Option(help="Of which percentages are taken; default: measured first.")
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="How many, where the task has as many.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the problems, and of the sampling.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; default: the task's, or what the context holds.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put questions into the model's chat template.")] = True,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 256,
    kv_mix_lambda: Annotated[float | None, typer.Option(help=_field("mix_lambda"))] = None,
    kv_granularity: Annotated[Granularity | None, typer.Option(help=_field("granularity"))] = None,
    kv_scope: Annotated[Scope | None, typer.Option(help=_field("scope"))] = None,
    kv_order: Annotated[Order | None, typer.Option(help=_field("order"))] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure what budgets cost in accuracy, against the full cache of the same engine.

    Every policy with every budget and buffer is one setting of requests, and all run mixed in one engine.
    """
    config = _config(mix_lambda=kv_mix_lambda, granularity=kv_granularity, scope=kv_scope, order=kv_order)
    _need_eval_extra()
    from rkv_vllm.evaluation.command import Evaluation
    from rkv_vllm.evaluation.command import evaluate as run
    from rkv_vllm.evaluation.engines import EngineError, Sampling
    from rkv_vllm.evaluation.report import show
    from rkv_vllm.evaluation.runner import Plan
    from rkv_vllm.evaluation.settings import parse_budgets, parse_buffers, parse_policies
    from rkv_vllm.evaluation.tasks import make_task

    if base_url is None and model is None:
        raise typer.BadParameter("model: needed, unless --base-url names a server")
    if base_url is not None and (context.args or config.model_fields_set):
        theirs = [*context.args, *sorted(config.model_fields_set)]
        raise typer.BadParameter(f"the server at --base-url has its own settings: {' '.join(theirs)}")
    if samples > 1 and temperature == 0:
        raise typer.BadParameter("samples: greedy answers are all the same; give --temperature")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Standard output is for the result.
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    from rich.console import Console

    errors = Console(stderr=True)
    try:
        with redirect_stdout(sys.stderr):
            made = make_task(task, _pairs(task_option or []))
            asked = Evaluation(
                model=model,
                base_url=base_url,
                engine_arguments=context.args,
                config=config,
                task=made,
                plan=Plan(
                    budgets=parse_budgets(budgets),
                    policies=parse_policies(policies),
                    buffers=parse_buffers(buffers),
                    problems=problems,
                    samples=samples,
                    seed=seed,
                    concurrency=concurrency,
                ),
                sampling=Sampling(temperature, top_p, max_tokens or made.max_tokens, chat),
                full_length=full_length,
                command=shlex.join(["rkv-vllm", *sys.argv[1:]]),
                out=out,
            )
            summary = run(asked, errors)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    except EngineError as error:
        errors.print(f"{error}\nThe answers so far are in {out}.", style="red", markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print(f"Stopped. The same command goes on with the answers in {out}.")
        raise typer.Exit(130) from None
    if json:
        typer.echo(summary.model_dump_json(indent=2))
    else:
        show([summary], Console())
        typer.echo(f"Written to {out}: table.md, plot.svg, summary.json, answers.jsonl")


@app.command()
def eval_report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results of `rkv-vllm eval`.")],
    out: Annotated[Path | None, typer.Option(help="Folder for one table, plot and JSON of them all.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Put the results of several evaluations into one table and plot."""
    _need_eval_extra()
    from rich.console import Console

    from rkv_vllm.evaluation.command import merge
    from rkv_vllm.evaluation.report import show

    try:
        merged = merge(folders, out)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if json:
        typer.echo(merged.model_dump_json(indent=2))
    else:
        show(merged.runs, Console())


def _need_eval_extra() -> None:
    if missing := [name for name in ("matplotlib", "openai") if find_spec(name) is None]:
        raise typer.BadParameter(f"needs the extra `eval`; not installed: {', '.join(missing)}")


def _pairs(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"task-option: takes NAME=VALUE, not {word!r}")
        pairs[name] = value
    return pairs


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="All other options are vLLM's own, for every engine: see `vllm serve --help=all`.",
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
        list[Path] | None, typer.Option(help="Start nothing; show what such files of results hold.")
    ] = None,
    input: Annotated[int | None, _load("input", "tokens")] = None,
    output: Annotated[int | None, _load("output", "tokens")] = None,
    budget: Annotated[int | None, _load("budget")] = None,
    buffer: Annotated[int | None, _load("buffer")] = None,
    policy: Annotated[PolicyName | None, _load("policy")] = None,
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
    lives: Annotated[str | None, typer.Option(help="Kinds of engine in turn: stock, rkv, off.")] = None,
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
        float, typer.Option(min=0.0, help="Measure after so long even if the load is not steady.")
    ] = 20.0,
    profile: Annotated[
        int, typer.Option(min=0, help="Record so many steps with torch's profiler behind the windows.")
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

    fields = {
        "input": input,
        "output": output,
        "budget": budget,
        "buffer": buffer,
        "policy": policy,
        "concurrency": concurrency,
        "backlog": backlog,
        "batch": batch,
        "ages": ages,
        "max_age": max_age,
        "rkv_entry": rkv_entry,
        "warmup_tokens": warmup_tokens,
    }
    try:
        if report:
            command.show_files(report, json, plots)
            return
        chosen = command.choose(
            rows,
            group,
            only or [],
            models,
            {name: value for name, value in fields.items() if value is not None},
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


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a chat model; default: SmolLM2-135M-Instruct, prepared once."),
    ] = None,
    log: Annotated[Path | None, typer.Option(help="File for the server's output.")] = None,
) -> None:
    """Serve a small model on this machine's CPU and stream four answers with different KV budgets."""
    if missing := [name for name in ("vllm", "openai") if find_spec(name) is None]:
        raise typer.BadParameter(
            f"the demo needs vLLM and the extra `demo`; not installed: {', '.join(missing)}"
        )
    from rich.console import Console

    from rkv_vllm.demo.run import describe, run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped
    console = Console()
    try:
        run(console, model, log)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        console.print(f"The demo failed: {describe(error)}", style="red", markup=False)
        raise typer.Exit(1) from None


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _integers(option: str, words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option}: takes integers separated by commas, not {words!r}") from None


def _config(**settings: Any) -> RkvConfig:
    """The settings that were given, validated."""
    try:
        return RkvConfig(**{name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        lines = (
            f"{problem['loc'][0]}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise typer.BadParameter("; ".join(lines)) from None


def _kv_settings(**flags: Any) -> KvSettings:
    """The server's settings, validated; flags go before the environment, and into it for vLLM's processes."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = KvSettings(**given)
        settings.engine  # noqa: B018 - checks the engine's own settings together
        lines = KvPolicies.load(settings).describe()
    except ValidationError as error:
        raise typer.BadParameter(explain(error)) from None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    os.environ |= {f"{ENVIRONMENT_PREFIX}{name.upper()}": str(value) for name, value in given.items()}
    for line in lines:
        typer.echo(line)
    return settings


def _operation_settings(**flags: Any) -> None:
    """Validate the settings; flags go before the environment, and into it for vLLM's processes."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = OperationSettings(**given)
        settings.read_keys()
    except ValidationError as error:
        raise typer.BadParameter(explain(error)) from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    os.environ.update(settings.to_environment())


if __name__ == "__main__":
    app()
