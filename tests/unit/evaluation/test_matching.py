"""Matching answers: right ones in many dresses, wrong ones that look right, and nonsense."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rkv_vllm.evaluation.tasks.matching import COMPARE, boxed, exact, math_verify, number, numeric


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("x = -1,234.50 dollars", Fraction("-1234.5")),
        ("\N{MINUS SIGN}7", -7),
        ("10-3", 3),
        ("f(2)-3", 3),
        ("between 5 and 7%", 7),
        ("3/4", Fraction(3, 4)),
        ("3 / 4 of it", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("1.5e3", 1500),
        ("1,2,3", 3),
        ("1,2345", 2345),
        (r"so \boxed{17}, not 18", 17),
        (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{1} or rather \boxed{2}", 2),
        ("#### 72", 72),
        ("-0", 0),
        ("007", 7),
    ],
)
def test_the_number_of_an_answer(text: str, value: int | Fraction) -> None:
    """Proves that the last number is read, signs, commas, fractions and boxes included."""
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "none", "nan", "Infinity", "1/0", "-", "1,", "9" * 5000, r"\boxed{}", "1e9999", "\x00", "()" * 999],
)
def test_nonsense_matches_no_number(text: str) -> None:
    """Proves that what is no number, or one that never ends, is wrong, raises nothing and takes no time."""
    assert not numeric("3", text)


def test_exact_takes_the_whole_answer() -> None:
    """Proves that outer blanks and a box are set aside, and nothing else is."""
    assert exact("Paris", "  Paris\n")
    assert exact("Paris", r"It is \boxed{Paris}, I think.")
    assert not exact("Paris", "It is Paris")
    assert not exact("Paris", "paris")
    assert not exact("Paris", "")


def test_boxes_may_nest_and_must_close() -> None:
    """Proves that braces inside a box belong to it, and that an open box is none."""
    assert boxed(r"\boxed{\frac{1}{2}} or \boxed{\sqrt{x}}") == r"\sqrt{x}"
    assert boxed(r"\boxed{1") is None


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        (r"\frac{1}{2}", r"Thus $\boxed{0.5}$.", True),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}", True),
        ("4", "The answer is $4$", True),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", False),
        ("4", "I do not know", False),
        ("4", "", False),
        ("4", r"\boxed{" * 50, False),
    ],
)
def test_math_verify(expected: str, answer: str, right: bool) -> None:
    """Proves that equal expressions match in different forms, and that nonsense does not."""
    assert math_verify(expected, answer) is right


@pytest.mark.parametrize("match", COMPARE)
def test_every_match_knows_the_answer_itself(match: str) -> None:
    """Proves that each way of matching accepts the expected answer."""
    assert COMPARE[match]("12", "12")  # type: ignore[index]
