"""What runners ask of a compactor: one class a device and granularity."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from rkv_vllm.decisions.messages import Compaction

Round = TypeVar("Round", bound=Compaction, contravariant=True)
Tables = TypeVar("Tables", contravariant=True)
Evicted = TypeVar("Evicted")


class Stopwatch(Protocol):
    """Times compactions where they run."""

    def timed(self) -> AbstractContextManager[None]:
        """Times the work of a `with` block."""

    def take(self) -> list[int]:
        """Microseconds of each timed block that has ended since the last call."""


class Compactor(Protocol[Round, Tables, Evicted]):
    """Runs the rounds of a step over all layers, and writes the pages that stay into the block table.

    `Round` is the message of one granularity. `Tables` is how the runner's block table is read and written,
    and `Evicted` how it is said which pages were chosen to leave; both differ by device.
    """

    stopwatch: Stopwatch

    def run(self, rounds: Sequence[Round], tables: Tables) -> None:
        """Runs all rounds of one step.

        Args:
            rounds: in any order; they touch no page of one another.
            tables: the runner's block table, with the requests' pages before the rounds.
        """

    def take_evicted(self) -> list[Evicted]:
        """What was evicted since the last call; nothing where the scheduler has named all pages itself."""
