"""What runners ask of compactors: one class a device and granularity, one object a group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

from rkv_vllm.decisions.messages import Compaction

Round = TypeVar("Round", bound=Compaction)
Tables = TypeVar("Tables")
Evicted = TypeVar("Evicted")
_Round = TypeVar("_Round", bound=Compaction, contravariant=True)
_Tables = TypeVar("_Tables", contravariant=True)


class Stopwatch(Protocol):
    """Times compactions where they run."""

    def timed(self) -> AbstractContextManager[None]:
        """Times the work of a `with` block."""

    def take(self) -> list[int]:
        """Microseconds of each timed block that has ended since the last call."""


class Compactor(Protocol[_Round, _Tables, Evicted]):
    """Runs the rounds of a step over the layers of a group, and writes the pages that stay into its block
    table.

    `Round` is the message of one granularity. `Tables` is how the block table is read and written, and
    `Evicted` how it is said which pages were chosen to leave; both differ by device.
    """

    def warm_up(self) -> None:
        """Compiles what the first round would have to wait for."""

    def run(self, rounds: Sequence[_Round], tables: _Tables) -> None:
        """Runs all rounds of one step.

        Args:
            rounds: at least one, in any order; they touch no page of one another.
            tables: the block table of the group, with the requests' pages before the rounds.
        """

    def take_evicted(self) -> list[Evicted]:
        """What was evicted since the last call; nothing where the scheduler has named all pages itself."""


class GroupCompactors(Generic[Round, Tables, Evicted]):
    """Those of all groups, which run every round together.

    Attributes:
        compactors: each group's, with its block table.
        stopwatch: times what all groups take together.
    """

    def __init__(
        self, compactors: Sequence[tuple[Compactor[Round, Tables, Evicted], Tables]], stopwatch: Stopwatch
    ) -> None:
        self.compactors = compactors
        self.stopwatch = stopwatch

    def warm_up(self) -> None:
        """See `Compactor.warm_up`."""
        for compactor, _ in self.compactors:
            compactor.warm_up()

    def run(self, rounds: Sequence[Round]) -> None:
        """Runs all rounds of one step, of which there may be none."""
        if rounds:
            with self.stopwatch.timed():
                for compactor, tables in self.compactors:
                    compactor.run(rounds, tables)

    def take_evicted(self) -> list[Evicted]:
        """What was evicted since the last call."""
        return [evicted for compactor, _ in self.compactors for evicted in compactor.take_evicted()]
