"""What subcommands share: options, what they make of them, and where vLLM may print."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rkv_vllm.settings.config import EngineSettings, RkvConfig
from rkv_vllm.settings.error_text import explain
from rkv_vllm.settings.values import number

#: Settings of `RkvConfig` that no request can override, but for those that are about a default budget.
SHARED_SETTINGS = tuple(
    name for name in EngineSettings.model_fields if name not in ("beyond_pool", "auto_usage")
)


@dataclass(frozen=True)
class OptionGroup:
    """Options made of a model's fields, so that a field is declared once.

    Attributes:
        argument: parameter of the command that receives those options which were given, by field.
        model: whose fields they are.
        prefix: what the options begin with.
        names: the fields; None: all.
        environment: prefix of the variable that is named beside each.
        panel: title under which `--help` shows them.
    """

    argument: str
    model: type[BaseModel]
    prefix: str = "--"
    names: tuple[str, ...] | None = None
    environment: str | None = None
    panel: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.model.model_fields) if self.names is None else self.names

    def option_of(self, field: str) -> str:
        return f"{self.prefix}{field.replace('_', '-')}"

    def parameter_of(self, field: str) -> str:
        """The Python name of a field's option."""
        return self.option_of(field).lstrip("-").replace("-", "_")

    def source_of(self, field: str, chosen: Mapping[str, Any]) -> str:
        """What a user calls a field: the option, or else the variable.

        Args:
            chosen: the options that were given, by field.
        """
        if self.environment is None or field in chosen:
            return self.option_of(field)
        return f"{self.environment}{field.upper()}"

    def parameters(self) -> Iterator[inspect.Parameter]:
        """The options as typer reads them."""
        for name in self.fields:
            field = self.model.model_fields[name]
            variable = "" if self.environment is None else f" [{self.environment}{name.upper()}]"
            option = typer.Option(
                self.option_of(name),  # named, so that a flag has no `--no-` beside it
                help=f"{described(field)}{variable}",
                rich_help_panel=self.panel,
            )
            yield inspect.Parameter(
                self.parameter_of(name),
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_cli_type(field.annotation) | None, option],
            )


def takes(*groups: OptionGroup) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of each group, in place of the parameter that receives them."""
    by_argument = {group.argument: group for group in groups}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            group = by_argument.get(parameter.name)
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += [own] if group is None else group.parameters()

        def call(**arguments: Any) -> None:
            for group in groups:
                values = {name: arguments.pop(group.parameter_of(name)) for name in group.fields}
                arguments[group.argument] = given(**values)
            command(**arguments)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def described(field: FieldInfo) -> str:
    """A field's description and its default."""
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, bool):
        text = "on" if default else "off"
    elif isinstance(default, list | tuple):
        text = ",".join(map(str, default)) or "none"
    else:
        text = "none" if default is None else str(default)
    return f"{field.description} (default: {text})"


def _cli_type(annotation: Any) -> Any:
    """What a command line takes for a field: its one plain type or choice, and text for anything else."""
    kinds = {kind for kind in _leaves(annotation) if kind is not type(None)}
    (kind,) = kinds if len(kinds) == 1 else (str,)
    plain = kind in (bool, int, float, Path) or get_origin(kind) is Literal
    return kind if plain else str


def _leaves(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _leaves(member)
    else:
        yield annotation


#: The server's settings where a command takes them without the rest of a server's options.
RKV_SETTINGS = OptionGroup("settings", RkvConfig, prefix="--kv-")


def json(instead_of: str) -> Any:
    return typer.Option("--json", help=f"Print JSON instead of {instead_of}.")


def with_old_names(**names: str) -> dict[str, Any]:
    """For a subcommand whose options had other names, which go on working and are not shown.

    Args:
        names: the old name and the new one, without dashes in front, as in `budget="kv-budget"`.
    """
    return {"token_normalize_func": lambda name: names.get(name.replace("-", "_"), name)}


def with_vllm_options(whose: str, **old_names: str) -> dict[str, Any]:
    """For a subcommand that hands on the options it does not know, as `context.args`."""
    passing = {"allow_extra_args": True, "ignore_unknown_options": True}
    return {
        "context_settings": {**passing, **with_old_names(**old_names)},
        "epilog": f"All other options are {whose}: see `vllm serve --help=all`.",
    }


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def rkv_config(**settings: Any) -> RkvConfig:
    """The settings that were given, validated.

    Raises: typer.BadParameter that names each wrong one.
    """
    try:
        return RkvConfig(**{name: number(value) for name, value in settings.items()})
    except ValidationError as error:
        raise typer.BadParameter(explain(error, depth=1, named=RKV_SETTINGS.option_of)) from None


def integers(option: str, words: str) -> list[int]:
    """What an option has, separated by commas.

    Raises: typer.BadParameter.
    """
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option}: takes integers separated by commas, not {words!r}") from None


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
