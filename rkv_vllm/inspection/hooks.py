"""Where a recorder meets a worker.

The worker's compactor is re-typed to one that tells the recorder what it is given and what it keeps, so that
none of the others knows of recorders.
"""

from __future__ import annotations

from typing import Any

from rkv_vllm.inspection.recorder import Recorder


def attach(worker: Any, recorder: Recorder) -> tuple[int, int]:
    """To be called in a worker that shares its process with the recorder, once.

    Returns: layers and KV heads of the worker's cache.
    """
    from vllm.platforms import current_platform

    runner = worker.model_runner
    if current_platform.is_cpu():
        from rkv_vllm.inspection import cpu_hooks as hooks
    else:
        from rkv_vllm.inspection import gpu_hooks as hooks  # type: ignore[no-redef]
    for compactor, _ in runner._compactors.compactors:
        hooks.record_rounds(compactor, recorder)
    return len(runner._rkv_layers), runner._rkv_layers[0].num_kv_heads
