"""How errors show what somebody else wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from rkv_vllm.settings.error_text import (
    MOST_OF_MESSAGE,
    MOST_PROBLEMS,
    MOST_SHOWN,
    cut,
    explain,
    one_line,
    shown,
    shown_name,
)
from rkv_vllm.settings.requested import RequestedSettings

DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
CYCLE: list[Any] = []
CYCLE.append(CYCLE)

WRITTEN = [
    *("a\nb", "\x1b[31m", "\ud800", "é\u2028", '"', "x" * 100_000, "\ud800" * 100),
    *(10**4000, float("nan"), -1e308, ["y" * 100_000], {"\n\ud800": "\ud800"}, [1] * 100_000),
    *(DEEP, CYCLE, object(), {(1, 2): 3}, b"\xff", {"set"}),
]


@pytest.mark.parametrize("value", WRITTEN, ids=lambda value: type(value).__name__)
def test_whatever_was_written_is_short_and_in_one_line_of_ascii(value: Any) -> None:
    """Proves it of values of any depth and length, JSON or not, and of names."""
    for text in (shown(value), *([shown_name(value)] if isinstance(value, str) else [])):
        assert text.isascii() and text.isprintable()
        assert len(text) <= MOST_SHOWN + len("...")


@pytest.mark.parametrize("value", [None, True, 5, 5.0, "full", [1, "a"], {"a": {"b": []}}, "\u00e9", 2**40])
def test_what_is_short_is_shown_as_it_was_written(value: Any) -> None:
    """Proves that a client recognises its own JSON, and a name without quotes."""
    assert shown(value) == json.dumps(value)
    if isinstance(value, str):
        assert f'"{shown_name(value)}"' == shown(value)


def test_cuts_at_the_bound_and_not_before() -> None:
    """Proves that what just fits has no ellipsis."""
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "abc..."


def test_one_line_names_no_problem_twice_and_not_too_many() -> None:
    """Proves that an error is bounded however much is wrong, and says that there is more."""
    assert one_line(["a", "b", "a"]) == "a; b"
    many = one_line([str(number) for number in range(MOST_PROBLEMS + 5)])
    assert many.endswith(f"; {MOST_PROBLEMS - 1}; and 5 more")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = 1
    text: str = ""

    @field_validator("text")
    @classmethod
    def _repeats(cls, text: str) -> str:
        raise ValueError(f"is {text}")


@pytest.mark.parametrize(
    "fields",
    [
        {"\ud800": 1},
        {"a\nb": 1},
        {"n" * 100_000: 1},
        {"text": "t" * 100_000},
        {f"name {i} " * 10: i for i in range(1000)},
    ],
    ids=["surrogate", "line feed", "name", "message", "many"],
)
def test_explains_any_names_and_values_within_bounds(fields: dict[str, Any]) -> None:
    """Proves it of pydantic's errors, whose messages are ours in part."""
    with pytest.raises(ValidationError) as refused:
        Strict(**fields)
    text = explain(refused.value)
    assert text.isascii() and text.isprintable()
    assert len(text) < MOST_PROBLEMS * (MOST_SHOWN + 50) + MOST_OF_MESSAGE


@pytest.mark.parametrize(
    "extra_args",
    [
        {"rkv_policy": "p" * 15_000},
        {"rkv_budget": DEEP},
        {"rkv_budget": "\ud800\n"},
        {"rkv_" + "x" * 15_000: 1},
        {"rkv_\ud800\n": 1},
        {f"rkv_{number}": number for number in range(10_000)},
    ],
    ids=["policy", "deep", "surrogate", "name", "surrogate in a name", "many"],
)
def test_a_requests_error_is_a_short_line(extra_args: dict[str, Any]) -> None:
    """Proves it where the text goes into the engine's log and into answers: of all wrong settings a request
    may have."""
    with pytest.raises(ValueError, match=r"^rkv_") as refused:
        RequestedSettings.from_extra_args(extra_args)
    text = str(refused.value)
    assert text.isascii() and text.isprintable()
    assert len(text) < MOST_PROBLEMS * (MOST_SHOWN + 80)
