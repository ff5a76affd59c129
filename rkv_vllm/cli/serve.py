"""`rkv-vllm serve`: its options become settings in the environment, where vLLM's processes find them."""

from __future__ import annotations

import gc
from typing import Any

import typer

from rkv_vllm.cli.config_file import ConfigFile, vllm_arguments
from rkv_vllm.cli.options import takes
from rkv_vllm.cli.server_settings import (
    KV_CACHE,
    OPERATION,
    kv_settings,
    operation_settings,
    refuse_unknown_variables,
    to_environment,
)


@takes(KV_CACHE, OPERATION)
def serve(
    context: typer.Context, kv: dict[str, Any], operation: dict[str, Any], config: ConfigFile = None
) -> None:
    """Run vLLM's OpenAI server with R-KV on: `rkv-vllm serve MODEL` and any option of `vllm serve`.

    A request may choose its own settings: "kv_cache": {"budget": 1024} in its body.
    """
    refuse_unknown_variables()
    settings, rules = kv_settings(kv)
    to_environment(kv, operation_settings(operation))
    for line in rules.describe():
        typer.echo(line)
    from rkv_vllm.settings.command_line import serve_arguments
    from rkv_vllm.settings.engine_args import rkv_serve_flags

    try:
        arguments = serve_arguments(vllm_arguments(context, config), rkv_serve_flags(settings.engine))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    gc.disable()  # thousands of modules are imported, none of them garbage: a seventh of the time
    from rkv_vllm.server.launch import launch

    gc.enable()
    launch(arguments)
