"""`rkv-vllm serve`: its options become settings in the environment, where vLLM's processes find them."""

from __future__ import annotations

import gc
import os
from typing import Any

import typer
from pydantic import ValidationError

from rkv_vllm.cli.options import OptionGroup, takes
from rkv_vllm.server.caller_rules import ENVIRONMENT_PREFIX, KvSettings, RulesByApiKey
from rkv_vllm.server.operations import PREFIX, OperationSettings
from rkv_vllm.settings.error_text import explain

KV_CACHE = OptionGroup("kv", KvSettings, prefix="--kv-", environment=ENVIRONMENT_PREFIX, panel="KV cache")
OPERATION = OptionGroup(
    "operation",
    OperationSettings,
    names=tuple(name for name in OperationSettings.model_fields if name != "api_keys"),  # not to be seen
    environment=PREFIX,
    panel="Operation",
)


@takes(KV_CACHE, OPERATION)
def serve(context: typer.Context, kv: dict[str, Any], operation: dict[str, Any]) -> None:
    """Run vLLM's OpenAI server with R-KV on: `rkv-vllm serve MODEL` and any option of `vllm serve`.

    A request may choose its own settings: "kv_cache": {"budget": 1024} in its body.
    """
    settings = _kv_settings(kv)
    _operation_settings(operation)
    from rkv_vllm.settings.command_line import serve_arguments
    from rkv_vllm.settings.engine_args import rkv_serve_flags

    try:
        arguments = serve_arguments(context.args, rkv_serve_flags(settings.engine))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    gc.disable()  # thousands of modules are imported, none of them garbage: a seventh of the time
    from rkv_vllm.server.launch import launch

    gc.enable()
    launch(arguments)


def _kv_settings(chosen: dict[str, Any]) -> KvSettings:
    """The server's settings, validated; flags go before the environment, and into it for vLLM's processes."""
    try:
        settings = KvSettings(**chosen)
        settings.engine  # noqa: B018 - checks the engine's own settings together
        lines = RulesByApiKey.load(settings).describe()
    except ValidationError as error:
        raise typer.BadParameter(explain(error, depth=1)) from None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    os.environ |= {f"{ENVIRONMENT_PREFIX}{name.upper()}": str(value) for name, value in chosen.items()}
    for line in lines:
        typer.echo(line)
    return settings


def _operation_settings(chosen: dict[str, Any]) -> None:
    """Validate the settings; flags go before the environment, and into it for vLLM's processes."""
    try:
        settings = OperationSettings(**chosen)
        settings.read_keys()
    except ValidationError as error:
        raise typer.BadParameter(explain(error, depth=1)) from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    os.environ.update(settings.to_environment())
