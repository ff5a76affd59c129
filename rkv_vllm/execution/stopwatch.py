"""How long compactions took, measured where they run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CpuStopwatch:
    """For work that is done when the call returns."""

    def __init__(self) -> None:
        self._durations: list[int] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        started = time.perf_counter_ns()
        yield
        self._durations.append((time.perf_counter_ns() - started) // 1000)

    def take(self) -> list[int]:
        """Microseconds of each timed block since the last call."""
        durations, self._durations = self._durations, []
        return durations


class CudaStopwatch:
    """For work that a call only enqueues: events on the current stream, read once they have passed."""

    def __init__(self) -> None:
        self._durations: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def timed(self) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._durations.append((start, end))

    def take(self) -> list[int]:
        """Microseconds of each timed block that the device has finished meanwhile; never waits for one."""
        passed = []
        while self._durations and self._durations[0][1].query():
            start, end = self._durations.popleft()
            passed.append(round(start.elapsed_time(end) * 1000))
        return passed
