"""`rkv-vllm args`: the engine options for vLLM's own command line."""

from __future__ import annotations

from typing import Any

import typer

from rkv_vllm.cli import options


@options.takes(options.RKV_SETTINGS)
def args(settings: dict[str, Any]) -> None:
    """Print the engine options that switch R-KV on: `vllm serve MODEL $(rkv-vllm args --kv-budget 1024)`."""
    config = options.rkv_config(**settings)
    with options.vllm_on_stderr():  # what is printed here goes onto a command line
        from rkv_vllm.settings.engine_args import rkv_serve_flags

        flags = rkv_serve_flags(config)
    typer.echo(" ".join(flags))
