"""What a task is to everything around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        name: unique in its task.
        prompt: what a user says, put into the model's chat template, or the token ids of the whole prompt.
        is_right: whether an answer, the text behind the thinking, is right, or all that was generated where
            the task judges the thinking; takes any text.
    """

    name: str
    prompt: str | Sequence[int]
    is_right: Callable[[str], bool]


class TaskOptions(BaseModel):
    """Options of a task, given as words on a command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(Protocol):
    """Attributes:
    max_tokens: limit on an answer's tokens where none was given; None: what the context has room for.
    opens_thinking: whether the prompts, as token ids, end with the start of the thinking.
    judges_thinking: whether it is the thinking that is right or wrong, wherever it was cut off.
    decode: the text of an answer's token ids; None: the model's tokenizer has to say.
    """

    max_tokens: int | None
    opens_thinking: bool
    judges_thinking: bool
    decode: Decode | None

    def describe(self) -> dict[str, Any]:
        """What makes the problems what they are, for the run's file: a run with another one is another
        run."""

    def problems(self, count: int, seed: int) -> list[Problem]:
        """At most `count`; with a larger count and the same seed, the same ones first."""
