"""What reasoning-gym asks: three of its datasets, in the sizes to learn from and to be judged by.

    cd benchmarks && python -m puzzles.questions number_sorting

prints the options of `rkv-vllm eval` that ask them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puzzles.chains import Chain, find_path, multiply, sort_numbers

#: Where the seeds of what is learned begin, and those of what is asked meanwhile. A dataset's question number
#: i is that of `seed + i`: evaluations with smaller seeds have other questions.
LEARNED_SEED, HELD_OUT_SEED = 1 << 41, 1 << 40


@dataclass(frozen=True)
class Puzzle:
    """A dataset of reasoning-gym.

    Attributes:
        name: of the dataset.
        solve: a question's chain of thought.
        sizes: options with `min_` and `max_` before them that make a question long.
        smallest: size that is learned from.
        largest: size that is learned from, and the only one to be judged by.
        options: all others.
    """

    name: str
    solve: Callable[[str], Chain]
    sizes: tuple[str, ...]
    smallest: int
    largest: int
    options: dict[str, Any]

    def of_sizes(self, smallest: int, largest: int) -> dict[str, Any]:
        """The dataset's options for questions of these sizes."""
        limits = {"min": smallest, "max": largest}
        sizes = {f"{end}_{size}": limit for size in self.sizes for end, limit in limits.items()}
        return sizes | self.options

    @property
    def task(self) -> list[str]:
        """Options of `rkv-vllm eval` for the questions to be judged by."""
        judged = self.of_sizes(self.largest, self.largest)
        options = [word for name, value in judged.items() for word in ("--task-option", f"{name}={value}")]
        return ["--task", f"reasoning-gym:{self.name}", *options]


#: By name.
PUZZLES = {
    puzzle.name: puzzle
    for puzzle in (
        Puzzle(
            "number_sorting",
            solve=sort_numbers,
            sizes=("numbers",),
            smallest=2,
            largest=14,
            # All numbers have the same form.
            options={"min_decimals": 1, "max_decimals": 1, "min_value": 100, "max_value": 999},
        ),
        Puzzle(
            "shortest_path",
            solve=find_path,
            sizes=("rows", "cols"),
            smallest=2,
            largest=7,
            options={"p_blocked": 0.2},
        ),
        Puzzle("products", solve=multiply, sizes=("digits",), smallest=1, largest=7, options={}),
    )
}

if __name__ == "__main__":
    print(*PUZZLES[sys.argv[1]].task)
