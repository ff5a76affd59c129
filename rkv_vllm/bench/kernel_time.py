"""Which kernels a GPU spent its time on, out of a trace of torch's profiler (pure)."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

#: Classes by name of the kernel; the first that matches counts.
CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        (
            "compaction",
            r"^_(survey|merge|matches|sums|combine|statistics|attention|redundancy|standard"
            r"|page_sums|select|rank|layer|global|move|stage)_kernel",
        ),
        ("extension per step", r"^_(physical|record)_kernel"),
        ("attention", r"flash|fmha|attention|attn|unified"),
        ("products", r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|matmul"),
        ("KV write", r"reshape_and_cache|cache_kernel"),
        ("sampling", r"argmax|sampl|topk|top_k|gumbel|softmax|logit|penalt|temperature"),
        ("norms and activations", r"triton_(poi|red|per|for)|norm|silu|act_and_mul|rotary"),
        ("copies", r"^memcpy|^memset"),
    )
)
OTHER = "other"
#: Kernels that are named one by one.
MOST_KERNELS = 25
GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


class Kernel(BaseModel):
    name: str
    in_class: str
    calls_per_step: float
    milliseconds_per_step: float


class KernelTime(BaseModel):
    """Milliseconds a step by class; `idle`: no kernel ran; `span` is from the first kernel to the last one.

    Classes can add up to more than span - idle: kernels may overlap.
    """

    steps: int
    span: float
    idle: float
    classes: dict[str, float]
    kernels: list[Kernel]


def class_of(kernel: str) -> str:
    return next((name for name, pattern in CLASSES if pattern.search(kernel)), OTHER)


def kernel_time(events: Iterable[dict[str, Any]], steps: int) -> KernelTime:
    """Sums up a trace.

    Args:
        events: `traceEvents` of a Chrome trace, times in microseconds; only what ran on the GPU counts.
        steps: of the engine while the profiler was on.

    Raises: ValueError where the trace has no kernel.
    """
    spent: dict[str, list[float]] = defaultdict(list)
    intervals = []
    for event in events:
        if event.get("cat") in GPU_CATEGORIES:
            spent[event["name"]].append(event["dur"])
            intervals.append((event["ts"], event["ts"] + event["dur"]))
    if not intervals:
        raise ValueError("the trace has no kernels")
    intervals.sort()
    begun, end = intervals[0]
    idle = 0.0
    for start, stop in intervals:
        idle += max(start - end, 0.0)
        end = max(end, stop)
    a_step = 1000 * steps
    classes: dict[str, float] = defaultdict(float)
    for name, durations in spent.items():
        classes[class_of(name)] += sum(durations) / a_step
    kernels = [
        Kernel(
            name=name[:120],
            in_class=class_of(name),
            calls_per_step=len(durations) / steps,
            milliseconds_per_step=sum(durations) / a_step,
        )
        for name, durations in sorted(spent.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]
    ]
    return KernelTime(
        steps=steps,
        span=(end - begun) / a_step,
        idle=idle / a_step,
        classes=dict(sorted(classes.items(), key=lambda item: -item[1])),
        kernels=kernels,
    )


def read_trace(path: Path, steps: int) -> KernelTime:
    """Sums up a file that torch's profiler wrote."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return kernel_time(json.load(file)["traceEvents"], steps)
