"""What the values of single settings may be, however a user writes them; no vLLM, no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field

from rkv_vllm.settings.error_text import shown
from rkv_vllm.settings.request_size import is_share

#: Newest tokens, which are always kept; their queries give R-KV's importance (the paper's alpha).
WINDOW = 8
#: `rkv_budget` of a request that keeps its full cache.
OFF = 0
#: Budget of a request that keeps its full cache until memory is short.
AUTO: Literal["auto"] = "auto"

BudgetTokens = Annotated[int, Field(gt=WINDOW, strict=True)]
BufferTokens = Annotated[int, Field(ge=WINDOW, strict=True)]
#: Tokens of a request, its prompt included.
Length = Annotated[int, Field(gt=0, strict=True)]


class Switch(NamedTuple):
    """One step in which a request with budget "auto" comes down.

    Attributes:
        at: length, in tokens, at which it does.
        kept: tokens that stay.
    """

    at: int
    kept: int

    def __str__(self) -> str:
        return f"{self.at}:{self.kept}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of what `str` makes of one."""
        at, _, kept = text.partition(":")
        return cls(int(at), int(kept))


#: A `Switch` as text, such as "1490:745".
SwitchText = Annotated[str, Field(pattern=r"^[1-9]\d{0,9}:[1-9]\d{0,9}$")]


def is_budget(value: Any) -> bool:
    """Whether this is a number of tokens that leaves some to choose, a share as in "25%", or "auto"."""
    is_tokens = isinstance(value, int) and not isinstance(value, bool) and value > WINDOW
    return is_tokens or is_share(value) or value == AUTO


#: What `budget` takes, behind its name in an error.
BUDGET_TAKES = f'takes an integer above {WINDOW}, "{AUTO}" or a share as in "25%"'


def _budget(value: Any) -> Any:
    if not is_budget(value):
        raise ValueError(f"{BUDGET_TAKES}, not {shown(value)}")
    return value


def _off_or_budget(value: Any) -> Any:
    is_off = isinstance(value, int) and not isinstance(value, bool) and value == OFF
    return value if is_off else _budget(value)


#: What `protect` takes, behind its name in an error.
PROTECT_TAKES = 'takes a number of tokens from 0 on, or "prompt"'


def _tokens_or_prompt(value: Any) -> Any:
    is_tokens = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_tokens and value != "prompt":
        raise ValueError(f"{PROTECT_TAKES}, not {shown(value)}")
    return value


Budget = Annotated[int | str, BeforeValidator(_budget)]
OffOrBudget = Annotated[int | str, BeforeValidator(_off_or_budget)]
#: First tokens of a request that never leave.
Protected = Annotated[int | Literal["prompt"], BeforeValidator(_tokens_or_prompt)]


def number(value: Any) -> Any:
    """Digits as the integer they are: command lines and environments hold only text."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
