"""`rkv-vllm args`: the engine options for vLLM's own command line."""

from __future__ import annotations

from typing import Annotated

import typer

from rkv_vllm.cli import options


def args(
    budget: options.Budget = None,
    buffer: options.Buffer = None,
    policy: options.Policy = None,
    mix_lambda: options.MixLambda = None,
    beyond_pool: Annotated[bool, options.beyond_pool("--beyond-pool")] = False,
    granularity: options.Granularity = None,
    scope: options.Scope = None,
    order: options.Order = None,
) -> None:
    """Print the engine options that switch R-KV on: `vllm serve MODEL $(rkv-vllm args --budget 1024)`."""
    config = options.rkv_config(
        budget=budget,
        buffer=buffer,
        policy=policy,
        mix_lambda=mix_lambda,
        beyond_pool=beyond_pool,
        granularity=granularity,
        scope=scope,
        order=order,
    )
    with options.vllm_on_stderr():  # what is printed here goes onto a command line
        from rkv_vllm.settings.engine_args import rkv_serve_flags

        flags = rkv_serve_flags(config)
    typer.echo(" ".join(flags))
