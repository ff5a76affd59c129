"""Whether an answer in words means the expected one. Takes any text a model may write."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Literal

Match = Literal["exact", "numeric", "math-verify"]

BOXED = "\\boxed{"
#: Digits beyond this are a model that cannot stop, and no number to compare with.
MOST_DIGITS = 100
MINUS = "\N{MINUS SIGN}"
NUMBER = re.compile(
    rf"(?:(?<![\w)])[-+{MINUS}])?"  # a sign, unless it stands between two operands
    r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"
    r"(?:\s?/\s?\d+(?![\d.]))?"
)
FRACTION = re.compile(r"(-?)\s*\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")


def boxed(text: str) -> str | None:
    r"""What is inside the last `\boxed{...}`, braces balanced; None where there is none that is closed."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    start += len(BOXED)
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def number(text: str) -> Fraction | None:
    r"""The number a text ends with: the last one in it, of what is in `\boxed{...}` where there is that.

    Thousands' commas, signs, decimals, powers of ten and fractions are read; units and words are passed over.
    """
    inside = boxed(text)
    text = FRACTION.sub(r" \1\2/\3 ", text if inside is None else inside)
    found = [match.group() for match in NUMBER.finditer(text)]
    if not found or len(found[-1]) > MOST_DIGITS:
        return None
    numerator, slash, denominator = re.sub(r"[,\s]", "", found[-1]).replace(MINUS, "-").partition("/")
    if slash and not int(denominator):
        return None
    return Fraction(Decimal(numerator)) / (int(denominator) if slash else 1)


def exact(expected: str, answer: str) -> bool:
    r"""The whole answer, or what is in its last `\boxed{...}`, is the expected text; outer blanks aside."""
    inside = boxed(answer)
    return (answer if inside is None else inside).strip() == expected.strip()


def numeric(expected: str, answer: str) -> bool:
    """Both end with the same number."""
    right = number(expected)
    return right is not None and number(answer) == right


def math_verify(expected: str, answer: str) -> bool:
    """Both are the same expression, as the package math-verify reads and compares them."""
    from math_verify import parse, verify

    gold = expected if boxed(expected) is not None or "$" in expected else f"{BOXED}{expected}}}"
    return bool(verify(parse(gold), parse(answer)))


COMPARE: dict[Match, Callable[[str, str], bool]] = {
    "exact": exact,
    "numeric": numeric,
    "math-verify": math_verify,
}
