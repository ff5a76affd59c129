"""Comparison of what two engines, or two runs of one, answered."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from engine_process import Answer


def assert_bit_identical(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same tokens, and the same logprobs to the last bit."""
    for answer, other in zip(found, expected, strict=True):
        assert answer.tokens == other.tokens
        assert answer.logprobs == other.logprobs


def assert_alike(found: Sequence[Answer], expected: Sequence[Answer], *, within: float = 1e-4) -> None:
    """The same tokens, and logprobs that differ by rounding: another batch size takes other kernels."""
    for answer, other in zip(found, expected, strict=True):
        assert answer.tokens == other.tokens
        assert answer.logprobs == pytest.approx(other.logprobs, abs=within)
