"""`rkv-vllm doctor`: what a server with these options would meet."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rkv_vllm.cli import options
from rkv_vllm.cli.options import OptionGroup
from rkv_vllm.settings.config import RkvConfig


@options.takes(OptionGroup("settings", RkvConfig, prefix="--kv-"))
def doctor(
    context: typer.Context,
    settings: dict[str, Any],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a request, prompt and answer; default: max_model_len.")
    ] = None,
    json: Annotated[bool, options.json("tables")] = False,
) -> None:
    """Say what `rkv-vllm serve MODEL ...` would meet: versions, what is refused, how many requests fit.

    Takes the arguments of `rkv-vllm serve`, starts nothing, and exits with 1 where something is refused.
    Without a MODEL it looks at the installation alone.
    """
    config = options.rkv_config(**settings)
    from rkv_vllm.cli.diagnosis import diagnose, show

    try:
        with options.vllm_on_stderr(level="ERROR"):
            found = diagnose(context.args, config, length)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        from rich.console import Console

        show(found, Console())
    raise typer.Exit(1 if found.refused else 0)
