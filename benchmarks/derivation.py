"""The derivation task: a synthetic long chain-of-thought problem with checkable answers.

A problem lists N variable definitions, each built on earlier ones, and asks for four of them. The
solution derives the variables one by one, re-checks each step ("wait ...", "check ..."), then
re-derives everything once more per requested verification pass: long, redundant reasoning in which
any definition and any value found so far may be needed again. Values are one digit, modulo 10.

Problems with the same N and passes have prompts and solutions of the same length, so that a batch
of them decodes in lockstep.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

KEYWORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<think>", "</think>", "check", "wait", "ok", "again"]
CHARS = list(string.digits + string.ascii_lowercase + "=+-*;?#.:, ")
VOCAB = KEYWORDS + CHARS
TOKEN_ID = {token: i for i, token in enumerate(VOCAB)}
PAD, BOS, EOS, USER, THINK, END_THINK = range(6)
TOKEN_PATTERN = re.compile("|".join(map(re.escape, KEYWORDS)) + "|.")
ASKED = 4
OPERATIONS = {
    "+": lambda x, y: (x + y) % 10,
    "-": lambda x, y: (x - y) % 10,
    "*": lambda x, y: (x * y) % 10,
}


def make_problem(rng: random.Random, n_vars: int, passes: int) -> dict[str, str]:
    """Builds one problem.

    Args:
        rng: what to draw from.
        n_vars: number of variables, 5 to 26.
        passes: number of verification passes.

    Returns: prompt, solution and answer.
    """
    names = rng.sample(string.ascii_lowercase, n_vars)
    n_const = max(2, n_vars // 5)
    kinds = ["var" if i % 2 else "op" for i in range(n_vars - n_const)]
    rng.shuffle(kinds)
    definitions: list[str] = []
    first: list[str] = []
    again: list[str] = []
    values: dict[str, int] = {}
    for i, name in enumerate(names):
        if i < n_const:
            values[name] = rng.randrange(10)
            definition = step = f"{name}:{values[name]}"
            definitions.append(f"{definition}  ")
            first.append(f"{step}.")
        else:
            x = rng.choice(names[max(0, i - 8) : i])
            op = rng.choice("+-+-*")
            if kinds[i - n_const] == "var":
                y = rng.choice(names[:i])
                right, looked_up = values[y], f"{x}:{values[x]} {y}:{values[y]}"
            else:
                y = right = rng.randrange(10)
                looked_up = f"{x}:{values[x]}"
            values[name] = OPERATIONS[op](values[x], right)
            definition = f"{name}={x}{op}{y}"
            step = f"{looked_up} {name}:{values[name]}"
            definitions.append(definition)
            first.append(f"{definition} {step}.{rng.choice(('check', 'wait'))} {step} ok.")
        again.append(f"{step}.")
    asked = rng.sample(names, ASKED)
    answer = ",".join(f"{name}:{values[name]}" for name in asked)
    body = "".join(first) + ("again:" + "".join(again)) * passes
    return {
        "prompt": ";".join(definitions) + f"?{','.join(asked)}#{passes}",
        "solution": f"<think>{body}</think>{answer}",
        "answer": answer,
    }


def encode(text: str) -> list[int]:
    """Token ids of a text; keywords are single tokens, everything else one token a character."""
    return [TOKEN_ID[token] for token in TOKEN_PATTERN.findall(text)]


def decode(ids: Sequence[int]) -> str:
    """The text of token ids."""
    return "".join(VOCAB[i] for i in ids)


def prompt_ids(problem: dict[str, str]) -> list[int]:
    """Token ids of the prompt, up to the opened thinking."""
    return [BOS, USER] + encode(problem["prompt"]) + [THINK]


def parse_answer(text: str) -> str | None:
    """What follows the thinking, up to the end of the sequence; None where it never ended."""
    _, ended, answer = text.partition("</think>")
    return answer.partition("<eos>")[0] if ended else None
