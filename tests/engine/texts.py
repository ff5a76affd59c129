"""Prompts that the small model continues for long, and whose next token is rarely a close call."""

from __future__ import annotations

from collections.abc import Callable

#: Text to tokens.
Encode = Callable[[str], list[int]]

COUNTDOWN = "Count down from 100: 100, 99, 98, 97,"
KING = "Once upon a time there was a king who had three sons. The eldest"


def multiples(of: int, repeats: int = 3) -> str:
    return f"The multiples of {of} are " + ", ".join(str(of * n) for n in range(1, 4 * repeats)) + ","


def squares(lines: int, first: int = 1) -> str:
    """About 15 tokens a line."""
    return " ".join(f"Line {n}: the square of {n} is {n * n}." for n in range(first, first + lines))
