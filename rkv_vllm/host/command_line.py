"""What vLLM reads in command lines of `vllm serve`, and how it writes settings of a file onto one."""

from __future__ import annotations

from collections.abc import Iterable
from tempfile import NamedTemporaryFile
from typing import Any

import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rkv_vllm.host.moved import make_arg_parser, validate_parsed_serve_args
from rkv_vllm.settings.command_line import serve_arguments
from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.engine_args import rkv_serve_flags
from rkv_vllm.settings.error_text import nearest, shown_name


def engine_arguments(command: str, arguments: list[str], config: RkvConfig) -> AsyncEngineArgs:
    """
    Args:
        command: of `rkv-vllm`, for messages.
        arguments: options of `vllm serve`, the model among them.
        config: the R-KV settings that all requests share.

    Raises: ValueError for an option that cannot be combined with R-KV; SystemExit, after a message, for one
    that vLLM does not know.
    """
    commands = FlexibleArgumentParser(prog="rkv-vllm").add_subparsers(dest="subparser")
    parser = commands.add_parser(command, usage=f"rkv-vllm {command} [any option of `vllm serve`]")
    parsed = make_arg_parser(parser).parse_args(serve_arguments(arguments, rkv_serve_flags(config)))
    try:
        validate_parsed_serve_args(parsed)
    except TypeError as error:  # which it raises for options that need another one
        raise ValueError(str(error)) from None
    if parsed.model_tag is not None:
        parsed.model = parsed.model_tag
    return AsyncEngineArgs.from_cli_args(parsed)


def file_arguments(settings: dict[str, Any], others: Iterable[str] = ()) -> list[str]:
    """vLLM's settings out of a YAML file, as vLLM writes them onto its command line.

    Args:
        settings: by option without dashes, as the file has them.
        others: options that the file may have beside vLLM's, for what is said about a wrong name.

    Raises: ValueError for a name that is no option.
    """
    parser = make_arg_parser(FlexibleArgumentParser())
    known = [*others, *parser._option_string_actions]
    for name in settings:
        option = f"--{name.replace('_', '-')}"
        if option.partition(".")[0] not in known:
            raise ValueError(f"{shown_name(name)} is no option{nearest(option, known)}")
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        arguments: list[str] = parser.load_config_file(file.name)
    return arguments
