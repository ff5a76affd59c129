"""`rkv-vllm eval` and `rkv-vllm eval-report`: what budgets cost in accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rkv_vllm.cli import options
from rkv_vllm.cli.options import OptionGroup
from rkv_vllm.provenance import command_line
from rkv_vllm.settings.config import AUTO_NEEDS_TOKENS, RkvConfig
from rkv_vllm.settings.values import AUTO

#: What all requests of a run's engine share.
SHARED = (*options.SHARED_SETTINGS, "auto_usage")


@options.takes(OptionGroup("shared", RkvConfig, prefix="--kv-", names=SHARED))
def evaluate(
    context: typer.Context,
    task: Annotated[str, typer.Option(help="`derivation`, `program`, `jsonl:FILE` or `reasoning-gym:NAME`.")],
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
        str,
        typer.Option(
            "--kv-budget",
            help="Tokens, or percent of the mean length with the full cache, as in 10%; behind `auto:` the "
            "minimum of budget `auto`.",
        ),
    ] = "full,2048,1024,512",
    policies: Annotated[
        str, typer.Option("--kv-policy", help="What scores tokens.")
    ] = "invariant,rkv,snapkv,recency,random",
    buffers: Annotated[
        str, typer.Option("--kv-buffer", help="Tokens collected between two compactions.")
    ] = "128",
    protects: Annotated[
        str,
        typer.Option(
            "--kv-protect", help="First tokens of a request that never leave, or `prompt`, as in 0,prompt."
        ),
    ] = "0",
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
    *,
    shared: dict[str, Any],
    json: Annotated[bool, options.json("a table")] = False,
) -> None:
    """Measure what budgets cost in accuracy, against the full cache of the same engine.

    Every policy with every budget and buffer is one setting of requests, and all run mixed in one engine.
    """
    config = options.rkv_config(**shared)
    _need_eval_extra()
    from rkv_vllm.evaluation.command import Evaluation
    from rkv_vllm.evaluation.command import evaluate as run
    from rkv_vllm.evaluation.engines import EngineError, Sampling
    from rkv_vllm.evaluation.report import show
    from rkv_vllm.evaluation.runner import Plan
    from rkv_vllm.evaluation.settings import (
        parse_budgets,
        parse_buffers,
        parse_policies,
        parse_protects,
    )
    from rkv_vllm.evaluation.tasks import make_task

    if base_url is None and model is None:
        raise typer.BadParameter("model: needed, unless --base-url names a server")
    if base_url is not None and (context.args or config.model_fields_set):
        theirs = [*context.args, *sorted(config.model_fields_set)]
        raise typer.BadParameter(f"the server at --base-url has its own settings: {' '.join(theirs)}")
    if config.granularity == "page" and any(word.strip().startswith(AUTO) for word in budgets.split(",")):
        raise typer.BadParameter(f"--kv-budget: {AUTO} {AUTO_NEEDS_TOKENS}")
    if samples > 1 and temperature == 0:
        raise typer.BadParameter("samples: greedy answers are all the same; give --temperature")
    from rich.console import Console

    errors = Console(stderr=True)
    try:
        with options.vllm_on_stderr(level="WARNING"):
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
                    protects=parse_protects(protects),
                    problems=problems,
                    samples=samples,
                    seed=seed,
                    concurrency=concurrency,
                ),
                sampling=Sampling(temperature, top_p, max_tokens or made.max_tokens, chat),
                full_length=full_length,
                command=command_line(),
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


def eval_report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results of `rkv-vllm eval`.")],
    out: Annotated[Path | None, typer.Option(help="Folder for one table, plot and JSON of them all.")] = None,
    json: Annotated[bool, options.json("a table")] = False,
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
    if missing := options.missing("matplotlib", "openai"):
        raise typer.BadParameter(f"needs the extra `eval`; not installed: {missing}")


def _pairs(words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"task-option: takes NAME=VALUE, not {word!r}")
        pairs[name] = value
    return pairs
