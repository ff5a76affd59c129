"""Solves puzzles of reasoning-gym by long chains of thought: a question's words become thinking and answer.

Every step follows from what stands before it, and is short enough for a small model. What it needs differs:

- `number_sorting`: the newest list, among older ones that look much the same, and the next number;
- `shortest_path`: what became of a cell of the grid when it was last looked at, and at the end, one after the
  other, the cells from which others were reached, wherever that was;
- `products`: two lines of digits near the start all along, and every digit of the first half once more in the
  second.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

#: Words of the chains that are one token each, beside those of the questions.
WORDS = ("numbers", "insert", "grid", "search", "path", "digits", "rows", "columns", "result", "none")

#: Names of numbers to sort.
ITEMS = string.ascii_lowercase
#: Where a search looks from a cell, in this order: rows down, columns to the right.
MOVES = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
#: Names of a grid's rows and columns, the first and the last of which lie outside of the largest grid.
ROWS, COLUMNS = string.ascii_lowercase, string.digits
#: Names of the digits of both factors, the unit first. The first factor has one more, a zero at its front,
#: which takes the last carry of a row. What names are left go to the digits of the product.
FIRST, SECOND = string.ascii_lowercase, string.ascii_uppercase
MOST_DIGITS = 8


@dataclass(frozen=True)
class Chain:
    """The thinking, without the words that open and close it, and the answer."""

    thinking: str
    answer: str


def sort_numbers(question: str) -> Chain:
    """Inserts the numbers one by one, and writes the whole list each time.

    Numbers get names, `a781.4`, which stand behind them in the lists, `781.4a`.
    """
    found = _match(r"Sort these numbers in (ascending|descending) order: ([-\d., ]+)\n", question)
    numbers = found[2].split(", ")
    if len(numbers) > len(ITEMS):
        raise ValueError(f"{len(numbers)} numbers: there are names for {len(ITEMS)}")
    named = list(zip(ITEMS, numbers, strict=False))
    lines = [f"numbers\n{' '.join(name + number for name, number in named)}\n"]
    in_order: list[tuple[str, str]] = []
    for name, number in named:
        in_order.append((name, number))
        in_order.sort(key=lambda item: float(item[1]), reverse=found[1] == "descending")
        lines.append(f"insert {name}{number}: {' '.join(n + by for by, n in in_order)}\n")
    # As many tokens a number as in the answer.
    lines.append(f"result {', '.join(f'{number} {name}' for name, number in in_order)}\n")
    return Chain("".join(lines), str([number for _, number in in_order]))


def find_path(question: str) -> Chain:
    """Searches all that can be reached from the destination, breadth first; then walks from the start, from
    each cell to that from which it was reached.

    The grid is written down cell by cell with names. A line of the search has a number, a cell and what
    its neighbours are: `X` blocked, `|` outside, `-` seen before, `*` the start, or `+` and the number of
    the line that goes on from there.
    """
    grid = [line.split() for line in _match(r"grid:\n([*#OX \n]+)", question)[1].strip().splitlines()]
    if len(grid) > len(ROWS) - 2 or len(grid[0]) > len(COLUMNS) - 2:
        raise ValueError(f"a grid of {len(grid)} x {len(grid[0])} cells: there are names for 24 x 8")
    cells = {ROWS[r] + COLUMNS[c]: kind for r, row in enumerate(grid, 1) for c, kind in enumerate(row, 1)}
    names = {kind: name for name, kind in cells.items()}
    lines = ["grid\n"]
    for r in range(1, len(grid) + 1):
        lines.append(" ".join(name + kind for name, kind in cells.items() if name[0] == ROWS[r]) + "\n")
    lines.append("search\n")
    queue, came_from = [names["#"]], {names["#"]: ""}
    for number, cell in enumerate(queue):  # which grows on the way
        seen = []
        for move in MOVES:
            to = _neighbour(cell, move)
            mark = cells.get(to, "|")
            if to in came_from:
                mark = "-"
            elif mark in "O*":
                came_from[to] = cell
                if mark == "O":
                    mark = f"+{len(queue):02d}"
                    queue.append(to)
            seen.append(to + mark)
        lines.append(f"{number:02d} {cell}: {' '.join(seen)}\n")
    at, steps, path = names["*"], [], [names["*"]]
    while came_from.get(at):
        to = came_from[at]
        steps.append(next(move for move in MOVES if _neighbour(at, move) == to))
        path.append(f"{steps[-1]} {to}")
        at = to
    lines.append(f"path {' '.join(path) if steps else 'none'}\n")
    return Chain("".join(lines), " ".join(steps) or "infeasible")


def multiply(question: str) -> Chain:
    """Multiplies every digit with every digit, row by row, and then sums the columns.

    Digits have names: `aB7*8+3=59` multiplies the first factor's unit by the second one's ten and adds the
    carry of the product before. Its last digit comes up again in the sum of a column, which begins with the
    carry of the column before.
    """
    found = _match(r"multiplication: (\d+) \* (\d+)\. ", question)
    first, second = [[int(digit) for digit in reversed(number)] for number in found.groups()]
    if max(len(first), len(second)) > MOST_DIGITS:
        raise ValueError(f"factors of more than {MOST_DIGITS} digits: there are no names for them")
    first.append(0)
    names = FIRST[len(first) :]
    lines = [f"digits\n{_named(FIRST, first)}\n{_named(SECOND, second)}\nrows\n"]
    units: dict[tuple[int, int], int] = {}
    for j, right in enumerate(second):
        carry, row = 0, []
        for i, left in enumerate(first):
            product = left * right + carry
            row.append(f"{FIRST[i]}{SECOND[j]}{left}*{right}+{carry}={product:02d}")
            carry, units[i, j] = divmod(product, 10)
        lines.append(" ".join(row) + "\n")
    lines.append("columns\n")
    total, digits = 0, []
    for column in range(len(first) + len(second) - 1):
        carry = total = total // 10
        terms = []
        for j in range(len(second)):
            if (column - j, j) in units:
                unit = units[column - j, j]
                total += unit
                terms.append(f"{FIRST[column - j]}{SECOND[j]}{unit}={total:02d}")
        digits.append(total % 10)
        lines.append(f"{names[column]}:{carry} {' '.join(terms)} {names[column]}{digits[-1]}\n")
    result = " ".join(reversed(_named(names, digits).split()))
    return Chain(
        "".join(lines) + f"result {result}\n", "".join(map(str, reversed(digits))).lstrip("0") or "0"
    )


def _match(pattern: str, question: str) -> re.Match[str]:
    found = re.search(pattern, question)
    if found is None:
        raise ValueError(f"not a question that this solver knows: {question!r}")
    return found


def _neighbour(cell: str, move: str) -> str:
    down, right = MOVES[move]
    return ROWS[ROWS.index(cell[0]) + down] + COLUMNS[COLUMNS.index(cell[1]) + right]


def _named(names: str, digits: Sequence[int]) -> str:
    return " ".join(f"{name}{digit}" for name, digit in zip(names, digits, strict=False))
