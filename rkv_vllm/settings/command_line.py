"""Command lines of `vllm serve`: one out of the user's options and ours, and what vLLM reads in it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import yaml

from rkv_vllm.settings.config import RkvConfig
from rkv_vllm.settings.error_text import nearest, shown_name

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

MIDDLEWARE = "rkv_vllm.server.middleware.KvCacheMiddleware"
#: The last one is the outermost.
OPERATIONS = "rkv_vllm.server.operations.OperationsMiddleware"
#: Options of vLLM that select what this package puts in their place.
TAKEN = frozenset({"--scheduler-cls", "--worker-cls"})
SETTINGS = "--additional-config"
PROCESSORS = "--logits-processors"


def serve_arguments(users: list[str], ours: list[str]) -> list[str]:
    """Everything behind `vllm serve`: the user's options, ours, and the middleware for budgets and reports.

    vLLM takes the last of two `--additional-config` and of two `--logits-processors`. The user's JSON is
    therefore rewritten in vLLM's dotted form, which it merges, and the user's processors go behind ours.

    Args:
        users: options of `vllm serve`, the model among them, in any order.
        ours: what `rkv_serve_flags` returned.

    Raises: ValueError for an option that cannot be combined with R-KV.
    """
    merged: list[str] = []
    processors: list[str] = []
    words = deque(users)
    while words:
        word = words.popleft()
        option, equals, value = word.partition("=")
        name = option.replace("_", "-") if option.startswith("--") else option
        if name in TAKEN:
            raise ValueError(f"{name} is set by rkv-vllm and cannot be chosen")
        if name == SETTINGS:
            merged += _dotted(value if equals or not words else words.popleft())
        elif name == PROCESSORS and equals:
            processors.append(value)
        elif name == PROCESSORS:
            while words and not words[0].startswith("-"):
                processors.append(words.popleft())
        else:
            merged.append(word)
    middlewares = [f"--middleware={MIDDLEWARE}", f"--middleware={OPERATIONS}"]
    return [*merged, *_with_processors(ours, processors), *middlewares]


def engine_arguments(command: str, arguments: list[str], config: RkvConfig) -> AsyncEngineArgs:
    """
    Args:
        command: of `rkv-vllm`, for messages.
        arguments: options of `vllm serve`, the model among them.
        config: the R-KV settings that all requests share.

    Raises: ValueError for an option that cannot be combined with R-KV; SystemExit, after a message, for one
    that vLLM does not know.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rkv_vllm.settings.engine_args import rkv_serve_flags

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
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

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


def _dotted(text: str) -> list[str]:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or any("." in key for key in settings):
        raise ValueError(f"{SETTINGS} takes a JSON object whose keys have no dots, not {text!r}")
    return [f"{SETTINGS}.{key}={json.dumps(setting)}" for key, setting in settings.items()]


def _with_processors(ours: list[str], processors: list[str]) -> list[str]:
    if not processors:
        return ours
    own = [flag.partition("=")[2] for flag in ours if flag.startswith(f"{PROCESSORS}=")]
    others = [flag for flag in ours if not flag.startswith(f"{PROCESSORS}=")]
    return [PROCESSORS, *own, *processors, *others]
