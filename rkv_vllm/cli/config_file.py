"""The YAML file of `--config`: any option of `rkv-vllm serve`, ours and vLLM's, as `kv-budget: 1024`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from rkv_vllm.cli.server_settings import KV_CACHE, OPERATION

#: Where the settings are kept that are vLLM's, by option.
_VLLMS = "rkv_vllm.config_file"


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's settings of ours the options' defaults, and keeps the others."""
    if path is None:
        return None
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"--config: {path}: {error}") from None
    if settings is None:
        settings = {}
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise typer.BadParameter(f"--config: {path}: takes options and their values, as in `kv-budget: 1024`")
    ours = {group.parameter_of(field) for group in (KV_CACHE, OPERATION) for field in group.fields}
    context.default_map, context.meta[_VLLMS] = {}, {}
    for name, value in settings.items():
        parameter = name.replace("-", "_")
        if parameter not in ours:
            context.meta[_VLLMS][name] = value
        elif value is not None:
            words = isinstance(value, list)
            context.default_map[parameter] = ",".join(map(str, value)) if words else value
    return path


#: Parameter of a command that takes such a file.
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,  # before the options whose defaults it has
        callback=_read,
        help="YAML file with options of this command and of vLLM; those given here go before it.",
    ),
]


def vllm_arguments(context: typer.Context, path: Path | None) -> list[str]:
    """vLLM's arguments: those of the command line, behind the file's.

    Raises: ValueError for a name in the file that is no option.
    """
    settings: dict[str, Any] = dict(context.meta.get(_VLLMS, {}))
    if not settings:
        return context.args
    from rkv_vllm.host.command_line import file_arguments

    model = settings.pop("model", None)
    given = context.args
    if given and not given[0].startswith("-"):
        model, given = given[0], given[1:]
    ours = [group.option_of(field) for group in (KV_CACHE, OPERATION) for field in group.fields]
    try:
        written = file_arguments(settings, ours)
    except ValueError as error:
        raise ValueError(f"--config: {path}: {error}") from None
    return [*([] if model is None else [str(model)]), *written, *given]
