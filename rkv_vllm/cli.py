"""The command `rkv-vllm`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from rkv_vllm import __version__
from rkv_vllm.config import PolicyName, RkvConfig
from rkv_vllm.server.operations import PREFIX, OperationSettings

app = typer.Typer(
    name="rkv-vllm",
    help="R-KV decode-time KV cache compression inside stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _field(name: str) -> str:
    return RkvConfig.model_fields[name].description or ""


def _operation(name: str) -> Any:
    text = f"{OperationSettings.model_fields[name].description} [{PREFIX}{name.upper()}]"
    return typer.Option(f"--{name.replace('_', '-')}", help=text, rich_help_panel="Operation")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="All other options are vLLM's own: see `vllm serve --help=all`.",
)
def serve(
    context: typer.Context,
    kv_budget: Annotated[int | None, typer.Option(help=_field("budget"))] = None,
    kv_buffer: Annotated[int | None, typer.Option(help=_field("buffer"))] = None,
    kv_policy: Annotated[PolicyName | None, typer.Option(help=_field("policy"))] = None,
    kv_mix_lambda: Annotated[float | None, typer.Option(help=_field("mix_lambda"))] = None,
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

    A request may choose its own settings in `vllm_xargs`: rkv_budget (0: full cache), rkv_buffer, rkv_policy.
    """
    config = _config(budget=kv_budget, buffer=kv_buffer, policy=kv_policy, mix_lambda=kv_mix_lambda)
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
        arguments = serve_arguments(context.args, rkv_serve_flags(config))
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
) -> None:
    """Print the engine options that switch R-KV on: `vllm serve MODEL $(rkv-vllm args --budget 1024)`."""
    config = _config(budget=budget, buffer=buffer, policy=policy, mix_lambda=mix_lambda)
    # vLLM logs to standard output when imported, and what we print there goes onto a command line.
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    with redirect_stdout(sys.stderr):
        from rkv_vllm.engine_args import rkv_serve_flags

        flags = rkv_serve_flags(config)
    typer.echo(" ".join(flags))


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


def _config(**settings: Any) -> RkvConfig:
    """The settings that were given, validated."""
    try:
        return RkvConfig(**{name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        lines = (f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise typer.BadParameter("; ".join(lines)) from None


def _operation_settings(**flags: Any) -> None:
    """Validate the settings; flags go before the environment, and into it for vLLM's processes."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = OperationSettings(**given)
        settings.read_keys()
    except ValidationError as error:
        lines = (f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise typer.BadParameter("; ".join(lines)) from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    os.environ.update(settings.to_environment())


if __name__ == "__main__":
    app()
