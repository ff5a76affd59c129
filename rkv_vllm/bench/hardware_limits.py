"""What the GPU can do at most, measured in its own process: `python -m rkv_vllm.bench.hardware_limits`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

from rkv_vllm.bench.results import Device
from rkv_vllm.bench.roofline import HardwareLimits

COPIED_BYTES = 4 << 30
PRODUCT_SIZE = 8192
REPETITIONS = 10


def measure_device() -> Device:
    """The first GPU and its limits; no limits where there is no GPU."""
    if not torch.cuda.is_available():
        return Device(name="CPU")
    source = torch.empty(COPIED_BYTES // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    left, right = (
        torch.randn((PRODUCT_SIZE, PRODUCT_SIZE), dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    product = _seconds(lambda: torch.mm(left, right))
    return Device(
        name=torch.cuda.get_device_name(),
        memory_gib=torch.cuda.get_device_properties(0).total_memory / 2**30,
        limits=HardwareLimits(
            bytes_per_second=COPIED_BYTES / copy, operations_per_second=2 * PRODUCT_SIZE**3 / product
        ),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Median of the device's time for it."""
    samples = []
    for _ in range(REPETITIONS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 1000)
    return statistics.median(samples[2:])


if __name__ == "__main__":
    sys.stdout.write(measure_device().model_dump_json())
