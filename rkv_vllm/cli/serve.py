"""`rkv-vllm serve`: its options become settings in the environment, where vLLM's processes find them."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from rkv_vllm.cli.options import given
from rkv_vllm.server.caller_rules import ENVIRONMENT_PREFIX, KvSettings, RulesByApiKey
from rkv_vllm.server.operations import PREFIX, OperationSettings
from rkv_vllm.settings.config import Granularity, Order, PolicyName, Scope
from rkv_vllm.settings.error_text import explain


def _setting(name: str) -> Any:
    help = f"{KvSettings.model_fields[name].description} [{ENVIRONMENT_PREFIX}{name.upper()}]"
    return typer.Option(f"--kv-{name.replace('_', '-')}", help=help, rich_help_panel="KV cache")


def _operation(name: str) -> Any:
    text = f"{OperationSettings.model_fields[name].description} [{PREFIX}{name.upper()}]"
    return typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="Operation")


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
    from rkv_vllm.settings.engine_args import rkv_serve_flags
    from rkv_vllm.settings.serve_arguments import serve_arguments

    try:
        arguments = serve_arguments(context.args, rkv_serve_flags(settings.engine))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    gc.disable()  # thousands of modules are imported, none of them garbage: a seventh of the time
    from rkv_vllm.server.launch import launch

    gc.enable()
    launch(arguments)


def _kv_settings(**flags: Any) -> KvSettings:
    """The server's settings, validated; flags go before the environment, and into it for vLLM's processes."""
    chosen = given(**flags)
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


def _operation_settings(**flags: Any) -> None:
    """Validate the settings; flags go before the environment, and into it for vLLM's processes."""
    chosen = given(**flags)
    try:
        settings = OperationSettings(**chosen)
        settings.read_keys()
    except ValidationError as error:
        raise typer.BadParameter(explain(error, depth=1)) from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    os.environ.update(settings.to_environment())
