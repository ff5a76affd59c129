"""`rkv-vllm doctor`: what a server with these options would meet."""

from __future__ import annotations

from typing import Annotated

import typer

from rkv_vllm.cli import options


def doctor(
    context: typer.Context,
    kv_budget: options.Budget = None,
    kv_buffer: options.Buffer = None,
    kv_policy: options.Policy = None,
    kv_mix_lambda: options.MixLambda = None,
    kv_beyond_pool: Annotated[bool, options.beyond_pool("--kv-beyond-pool")] = False,
    kv_granularity: options.Granularity = None,
    kv_scope: options.Scope = None,
    kv_order: options.Order = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a request, prompt and answer; default: max_model_len.")
    ] = None,
    json: Annotated[bool, options.json("tables")] = False,
) -> None:
    """Say what `rkv-vllm serve MODEL ...` would meet: versions, what is refused, how many requests fit.

    Takes the arguments of `rkv-vllm serve`, starts nothing, and exits with 1 where something is refused.
    Without a MODEL it looks at the installation alone.
    """
    config = options.rkv_config(
        budget=kv_budget,
        buffer=kv_buffer,
        policy=kv_policy,
        mix_lambda=kv_mix_lambda,
        beyond_pool=kv_beyond_pool,
        granularity=kv_granularity,
        scope=kv_scope,
        order=kv_order,
    )
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
