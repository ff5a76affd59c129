"""The derivation task: synthetic long reasoning with answers that can be checked.

A problem defines variables, each from earlier ones, and asks for four of them. The solution derives them one
by one, checks each step as it goes, and then goes over all of them again, once for each verification pass.
Any definition and any value may be needed long after it was written, so that an evicted one makes the answer
wrong. Values are digits, modulo 10.

It is for a model trained on it, whose tokens are the words and characters below.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from rkv_vllm.evaluation.tasks.base import Decode, Problem, TaskOptions

KEYWORDS = ("<pad>", "<bos>", "<eos>", "<user>", "<think>", "</think>", "check", "wait", "ok", "again")
VOCABULARY = (*KEYWORDS, *string.digits, *string.ascii_lowercase, *"=+-*;?#.:, ")
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}
TOKEN = re.compile("|".join(map(re.escape, KEYWORDS)) + "|.")
ASKED = 4
#: How far back a variable's first operand may be.
REACH = 8
OPERATIONS = {
    "+": lambda x, y: (x + y) % 10,
    "-": lambda x, y: (x - y) % 10,
    "*": lambda x, y: (x * y) % 10,
}


@dataclass(frozen=True)
class Derivation:
    """One problem: what is asked, the whole solution with its thinking, and the answer at its end."""

    prompt: str
    solution: str
    answer: str

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids up to the opened thinking, with which the solution begins."""
        return encode(f"<bos><user>{self.prompt}<think>")

    @property
    def solution_ids(self) -> list[int]:
        """Token ids of what a model generates behind the prompt, when it does it all."""
        return encode(f"{self.solution}<eos>")[1:]

    def is_right(self, answer: str) -> bool:
        return answer.partition("<eos>")[0] == self.answer


def make_derivation(rng: random.Random, variables: int, passes: int) -> Derivation:
    """Draws a problem; all with the same numbers of variables and passes have the same lengths in tokens.

    Args:
        rng: what to draw from.
        variables: 5 to 26.
        passes: verification passes.
    """
    names = rng.sample(string.ascii_lowercase, variables)
    constants = max(2, variables // 5)
    operands = ["variable" if i % 2 else "digit" for i in range(variables - constants)]
    rng.shuffle(operands)
    values: dict[str, int] = {}
    definitions: list[str] = []
    first: list[str] = []
    again: list[str] = []
    for i, name in enumerate(names):
        if i < constants:
            values[name] = rng.randrange(10)
            step = f"{name}:{values[name]}"
            definitions.append(f"{step}  ")
            first.append(f"{step}.")
        else:
            left = rng.choice(names[max(0, i - REACH) : i])
            operation = rng.choice("+-+-*")
            right: str | int
            if operands[i - constants] == "variable":
                right = rng.choice(names[:i])
                known, value = f"{left}:{values[left]} {right}:{values[right]}", values[right]
            else:
                right = value = rng.randrange(10)
                known = f"{left}:{values[left]}"
            values[name] = OPERATIONS[operation](values[left], value)
            definition, step = f"{name}={left}{operation}{right}", f"{known} {name}:{values[name]}"
            definitions.append(definition)
            first.append(f"{definition} {step}.{rng.choice(('check', 'wait'))} {step} ok.")
        again.append(f"{step}.")
    asked = rng.sample(names, ASKED)
    answer = ",".join(f"{name}:{values[name]}" for name in asked)
    thinking = "".join(first) + ("again:" + "".join(again)) * passes
    return Derivation(
        prompt=f"{';'.join(definitions)}?{','.join(asked)}#{passes}",
        solution=f"<think>{thinking}</think>{answer}",
        answer=answer,
    )


def encode(text: str) -> list[int]:
    """Token ids of a text: one a keyword, and one a character of the rest."""
    return [TOKEN_ID[token] for token in TOKEN.findall(text)]


def decode(ids: Sequence[int]) -> str:
    """The text of token ids; those beyond the vocabulary, which the model's table has too, show as `?`."""
    return "".join(VOCABULARY[i] if i < len(VOCABULARY) else "?" for i in ids)


class DerivationOptions(TaskOptions):
    variables: Annotated[int, Field(ge=5, le=26)] = 24
    passes: Annotated[int, Field(ge=0)] = 6


class DerivationTask:
    opens_thinking = True
    judges_thinking = False

    def __init__(self, options: DerivationOptions) -> None:
        self._options = options
        self._make = partial(make_derivation, variables=options.variables, passes=options.passes)
        solution = len(self._make(random.Random(0)).solution_ids)
        self.decode: Decode | None = decode
        self.max_tokens: int | None = 64 * math.ceil(1.05 * solution / 64)

    def describe(self) -> dict[str, Any]:
        return {"name": "derivation", **self._options.model_dump()}

    def problems(self, count: int, seed: int) -> list[Problem]:
        rng = random.Random(seed)
        drawn = [self._make(rng) for _ in range(count)]
        return [Problem(str(i), each.prompt_ids, each.is_right) for i, each in enumerate(drawn)]
