"""vLLM's engine arguments out of a command line, as `rkv-vllm serve` would read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rkv_vllm.settings.config import RkvConfig

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs


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
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rkv_vllm.settings.engine_args import rkv_serve_flags
    from rkv_vllm.settings.serve_arguments import serve_arguments

    commands = FlexibleArgumentParser(prog="rkv-vllm").add_subparsers(dest="subparser")
    parser = commands.add_parser(command, usage=f"rkv-vllm {command} [any option of `vllm serve`]")
    parsed = make_arg_parser(parser).parse_args(serve_arguments(arguments, rkv_serve_flags(config)))
    if parsed.model_tag is not None:
        parsed.model = parsed.model_tag
    return AsyncEngineArgs.from_cli_args(parsed)
