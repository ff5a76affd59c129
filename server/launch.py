"""Runs vLLM's own `serve` command in this process."""

from __future__ import annotations

import copy
import gc
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rkv_vllm.host.moved import cli_env_setup
from rkv_vllm.host.pool import too_small_remedy
from rkv_vllm.host.preflight import engine_config, start_problems
from rkv_vllm.host.process_end import skip_last_collections
from rkv_vllm.host.start_failure import TOO_SMALL, awaiting_failure
from rkv_vllm.server.operations import SHUTDOWN_TIMEOUT, prepare
from rkv_vllm.settings.config import RkvConfig


def launch(arguments: list[str]) -> None:
    """What `vllm serve ARGUMENTS` does; returns when the server has stopped.

    vLLM's own entry point asks for the version of a distribution named `vllm`, which the CPU build is not.

    Raises: SystemExit with status 2 for wrong arguments, and 1, its reason printed last, for a configuration
    with which an engine does not start: before one is started, where that is known.
    """
    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="rkv-vllm")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve.set_defaults(shutdown_timeout=SHUTDOWN_TIMEOUT)
    parsed = parser.parse_args([command.name, *arguments])
    try:
        prepare(parsed)
        configure_logging_from_args(parsed)
        command.validate(parsed)
        problems = _problems(copy.deepcopy(parsed))
    except (OSError, TypeError, ValueError) as error:  # TypeError: vLLM's, for options that need another one
        parser.error(str(error))
    if problems:
        refuse("rkv-vllm cannot run this configuration:", problems)
    skip_last_collections()
    reason = _run(command, parsed)
    if reason is None:
        return
    gc.collect()  # what the failed server held is stopped now, and logs that before the last word
    advice = []
    if reason.startswith(TOO_SMALL):
        advice = [too_small_remedy(RkvConfig.from_additional_config(parsed.additional_config))]
    refuse(reason, advice)


def _run(command: ServeSubcommand, parsed: Namespace) -> str | None:
    """Serves until the server is stopped. Returns why its engine did not start, if that is so."""
    with awaiting_failure() as failure:
        try:
            command.cmd(parsed)
        except RuntimeError as error:
            if (reason := failure.reason(error)) is None:
                raise
            return reason
    return None


def _problems(parsed: Namespace) -> list[str]:
    if parsed.model_tag is not None:
        parsed.model = parsed.model_tag
    return start_problems(engine_config(AsyncEngineArgs.from_cli_args(parsed), headless=parsed.headless))


def refuse(reason: str, details: Sequence[str] = ()) -> NoReturn:
    """Ends the process, with the reason as the last that it prints."""
    sys.stdout.flush()
    print("", reason, *(f"  - {detail}" for detail in details), sep="\n", file=sys.stderr, flush=True)
    raise SystemExit(1)
