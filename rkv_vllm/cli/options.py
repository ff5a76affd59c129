"""What subcommands share: options, what they make of them, and where vLLM may print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from rkv_vllm.settings import config
from rkv_vllm.settings.error_text import explain


def _field(name: str) -> str:
    return config.RkvConfig.model_fields[name].description or ""


# The settings of `RkvConfig`; a parameter's name says what the option is called.
Budget = Annotated[int | None, typer.Option(help=_field("budget"))]
Buffer = Annotated[int | None, typer.Option(help=_field("buffer"))]
Policy = Annotated[config.PolicyName | None, typer.Option(help=_field("policy"))]
MixLambda = Annotated[float | None, typer.Option(help=_field("mix_lambda"))]
Granularity = Annotated[config.Granularity | None, typer.Option(help=_field("granularity"))]
Scope = Annotated[config.Scope | None, typer.Option(help=_field("scope"))]
Order = Annotated[config.Order | None, typer.Option(help=_field("order"))]


def beyond_pool(option: str) -> Any:
    """A flag, whose name has to be given so that it has no `--no-` beside it."""
    return typer.Option(option, help=_field("beyond_pool"))


def json(instead_of: str) -> Any:
    return typer.Option("--json", help=f"Print JSON instead of {instead_of}.")


def with_vllm_options(whose: str) -> dict[str, Any]:
    """For a subcommand that hands on the options it does not know, as `context.args`."""
    return {
        "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
        "epilog": f"All other options are {whose}: see `vllm serve --help=all`.",
    }


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def rkv_config(**settings: Any) -> config.RkvConfig:
    """The settings that were given, validated.

    Raises: typer.BadParameter that names each wrong one.
    """
    try:
        return config.RkvConfig(**given(**settings))
    except ValidationError as error:
        raise typer.BadParameter(explain(error, depth=1)) from None


def missing(*packages: str) -> str:
    """The packages that are not installed, separated by commas."""
    return ", ".join(name for name in packages if find_spec(name) is None)


@contextmanager
def vllm_on_stderr(level: str | None = None) -> Iterator[None]:
    """Keeps standard output for the result: vLLM logs to it from its import on.

    Args:
        level: of vLLM's log, unless the environment has one.
    """
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    if level is not None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    with redirect_stdout(sys.stderr):
        yield
