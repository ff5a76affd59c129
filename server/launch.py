"""Runs vLLM's own `serve` command in this process."""

from __future__ import annotations

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rkv_vllm.server.operations import SHUTDOWN_TIMEOUT, prepare


def launch(arguments: list[str]) -> None:
    """What `vllm serve ARGUMENTS` does; returns when the server has stopped.

    vLLM's own entry point asks for the version of a distribution named `vllm`, which the CPU build is not.
    """
    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="rkv-vllm")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve.set_defaults(shutdown_timeout=SHUTDOWN_TIMEOUT)
    parsed = parser.parse_args([command.name, *arguments])
    try:
        prepare(parsed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)
