"""`rkv-vllm fidelity`: what budgets change in a model's predictions of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rkv_vllm.cli import options
from rkv_vllm.cli.options import OptionGroup
from rkv_vllm.provenance import command_line
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.policy_table import POLICY_NAMES
from rkv_vllm.settings.request_size import RequestSize


@options.takes(OptionGroup("shared", RkvConfig, prefix="--kv-", names=options.SHARED_SETTINGS))
def fidelity(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Directory or name of the model.")],
    budgets: Annotated[str, typer.Option("--kv-budget", help="Budgets to measure, separated by commas.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text in UTF-8; may be given several times.")
    ] = None,
    own_text: Annotated[
        bool, typer.Option("--own-text", help="Let the model write the texts first, with its full cache.")
    ] = False,
    own_text_from: Annotated[
        Path | None, typer.Option(help="Take the model's own texts from an earlier result, its --out.")
    ] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="What own texts are asked for, one a line; default: a built-in list.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of own texts; 0: greedy; default: 0.7.")
    ] = None,
    policies: Annotated[
        str | None, typer.Option("--kv-policy", help="Policies, separated by commas; default: all.")
    ] = None,
    buffers: Annotated[str, typer.Option("--kv-buffer", help="Buffers, separated by commas.")] = "128",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a window that are read as a prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window that are decoded.")] = 768,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of each text, at most; how many own texts.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of own texts, and of the intervals' bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the result as JSON.")] = None,
    *,
    shared: dict[str, Any],
    json: Annotated[bool, options.json("tables")] = False,
) -> None:
    """Measure what budgets change in a model's predictions of a text, against the engine's own full cache.

    The text is given, or the model writes it itself: --text, --own-text or --own-text-from.

    The engine decodes the text itself, so that no answers are needed; compactions happen as in serving.
    """
    config = options.rkv_config(**shared)
    from rich.console import Console

    from rkv_vllm.evaluation.fidelity import show
    from rkv_vllm.evaluation.fidelity_settings import settings_of
    from rkv_vllm.evaluation.fidelity_texts import source_of

    try:
        settings = settings_of(
            config,
            RequestSize(prompt=prompt, longest=prompt + tokens),
            options.integers("--kv-budget", budgets),
            options.integers("--kv-buffer", buffers),
            POLICY_NAMES if policies is None else [name.strip() for name in policies.split(",")],
        )
        source = source_of(text or [], own_text, own_text_from, instructions, temperature, seed, windows)
        with options.vllm_on_stderr(level="ERROR"):
            from rkv_vllm.evaluation.fidelity_run import Plan, run

            plan = Plan(command_line(), model, source, settings, config, prompt, tokens, windows, seed)
            report = run(plan, context.args, Console(stderr=True))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if out is not None:
        out.write_text(report.model_dump_json(indent=1) + "\n")
    if json:
        typer.echo(report.model_dump_json(indent=1))
    else:
        show(report, Console())
