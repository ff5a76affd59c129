"""`rkv-vllm demo`: the demo of `rkv_vllm.demo`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from rkv_vllm.cli import options


def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a chat model; default: SmolLM2-135M-Instruct, prepared once."),
    ] = None,
    log: Annotated[Path | None, typer.Option(help="File for the server's output.")] = None,
) -> None:
    """Serve a small model on this machine's CPU and stream four answers with different KV budgets."""
    if missing := options.missing("vllm", "openai"):
        raise typer.BadParameter(f"the demo needs vLLM and the extra `demo`; not installed: {missing}")
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
