"""How long compactions took, measured where they run, and the way of the result back to the scheduler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.v1.outputs import ModelRunnerOutput

#: Attribute of vLLM's ModelRunnerOutput with the microseconds of laps that ended since the last one.
_ATTRIBUTE = "rkv_compaction_microseconds"


class CpuStopwatch:
    """For work that is done when the call returns."""

    def __init__(self) -> None:
        self._laps: list[int] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        started = time.perf_counter_ns()
        yield
        self._laps.append((time.perf_counter_ns() - started) // 1000)

    def take(self) -> list[int]:
        """Microseconds of each lap since the last call."""
        laps, self._laps = self._laps, []
        return laps


class CudaStopwatch:
    """For work that a call only enqueues: events on the current stream, read once they have passed."""

    def __init__(self) -> None:
        self._laps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def lap(self) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._laps.append((start, end))

    def take(self) -> list[int]:
        """Microseconds of each lap that the device has finished meanwhile; never waits for one."""
        passed = []
        while self._laps and self._laps[0][1].query():
            start, end = self._laps.popleft()
            passed.append(round(start.elapsed_time(end) * 1000))
        return passed


def attach_laps(output: ModelRunnerOutput, microseconds: list[int]) -> None:
    """Puts laps on a step's output: a plain dataclass, pickled whole on its way to the scheduler."""
    if microseconds:
        setattr(output, _ATTRIBUTE, microseconds)


def laps_of(output: ModelRunnerOutput) -> list[int]:
    """What `attach_laps` put there; most steps have none."""
    return getattr(output, _ATTRIBUTE, [])
