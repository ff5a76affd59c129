"""The arguments that an engine is started with; they are read once before anything is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rkv_vllm.bench.rows import STOCK, Group, Kind
from rkv_vllm.settings.engine_args import rkv_engine_args


def check_arguments(group: Group, extra: Sequence[str]) -> None:
    """Reads the arguments of each kind of engine in a group, as its engines will.

    Args:
        extra: options for every engine, behind the group's own.

    Raises: SystemExit, after a message, for an option that vLLM does not know.
    """
    longest = max(row.length for row in group.rows)
    for kind in dict.fromkeys(group.lives):
        engine_arguments(kind, [*group.arguments(kind), *extra], group.model, None, longest, None)


def engine_arguments(
    kind: Kind,
    arguments: list[str],
    model: str | None,
    memory_gib: float | None,
    longest: int,
    trace_folder: str | None,
) -> AsyncEngineArgs:
    """The arguments of an engine of one kind.

    Args:
        arguments: options of `vllm serve`, the model's name or folder among them unless `model` has it.
        memory_gib: of the GPU, whatever it has; None: vLLM's share.
        longest: tokens of the longest request, for a max_model_len where none is among the arguments.
        trace_folder: where traces of the profiler go; None: no profiler.

    Raises: SystemExit, after a message, for an option that vLLM does not know.
    """
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="rkv-vllm bench"))
    parser.add_argument("model_tag", nargs="?")
    defaults: dict[str, Any] = {"max_model_len": longest, **({} if kind in STOCK else rkv_engine_args())}
    if memory_gib is not None:
        defaults["gpu_memory_utilization"] = memory_gib * 2**30 / current_platform.get_device_total_memory()
    if trace_folder is not None:
        defaults["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": trace_folder,
            "torch_profiler_activities": ["CUDA"],
            "torch_profiler_with_stack": False,
            "torch_profiler_dump_cuda_time_total": False,
        }
    parser.set_defaults(**defaults)
    parsed = parser.parse_args(arguments)
    parsed.model = parsed.model_tag or model or parsed.model
    return AsyncEngineArgs.from_cli_args(parsed)
