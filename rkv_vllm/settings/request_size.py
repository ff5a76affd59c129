"""What a request's settings may be a part of: its prompt, and the longest that it may become."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

_PERCENT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?%")


def is_share(value: Any) -> bool:
    """Whether this is a share of the longest that a request may become, above 0 and up to 100 %: "25%"."""
    return isinstance(value, str) and _PERCENT.fullmatch(value) is not None and 0 < _fraction(value) <= 1


@dataclass(frozen=True, slots=True)
class RequestSize:
    """Tokens of one request, as they are known when it arrives.

    Attributes:
        prompt: of its prompt.
        longest: prompt and answer, when it ends at the latest: by `max_tokens` and the model's context.
    """

    prompt: int
    longest: int

    def tokens_of(self, share: str) -> int:
        """How many tokens a share of the longest length is, rounded up."""
        return ceil(_fraction(share) * self.longest)


def _fraction(share: str) -> Fraction:
    return Fraction(share.removesuffix("%")) / 100
