"""The program task: a chain of thought that executes a small program step by step.

What a step needs is the latest value of a register, which makes all earlier ones useless though they look
alike, and any line of the program, which is in the prompt: it asks of an eviction policy what the derivation
task does not. The registers are judged as they stand after the asked number of steps, read out of the steps
themselves, since no text says when to stop.

It is for a model trained on it, whose tokens are those of the derivation task.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from rkv_vllm.evaluation.tasks.base import Decode, Problem, TaskOptions
from rkv_vllm.evaluation.tasks.derivation import OPERATIONS, decode, encode
from rkv_vllm.evaluation.thinking import END

#: Names of lines; "o" would make a keyword of "ok".
LABELS = string.ascii_lowercase.replace("o", "")
ASKED = 4
#: Shares of lines that jump, and of the others that have a digit on their right.
JUMPS, DIGITS = 0.25, 0.4
#: Share of the lines that a program visits at least, or it would be a short loop.
VISITED = 0.6
_STEP = re.compile(
    r"#[a-z]([a-z])(?:=[a-z][-+*][a-z0-9] [a-z]:\d [a-z0-9]:\d \1:(\d)"
    r"|\?[a-z]#[a-z] [a-z]:\d [a-z]:\d \?:[yn])"
)


@dataclass(frozen=True)
class Assignment:
    """`target = left operation right`; `right` is a register or a digit."""

    target: str
    left: str
    operation: str
    right: str


@dataclass(frozen=True)
class Jump:
    """On to the line `to` where `left` is less than `right`, else to the next."""

    left: str
    right: str
    to: str


@dataclass(frozen=True)
class Program:
    """One problem: its prompt, the whole trace, the registers at the start, and those that are asked for."""

    prompt: str
    trace: str
    steps: int
    start: Mapping[str, int]
    asked: Sequence[str]
    end: Mapping[str, int]

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids up to the opened thinking."""
        return encode(f"<bos><user>{self.prompt}<think>")

    @property
    def trace_ids(self) -> list[int]:
        """Token ids of what a model generates behind the prompt, when every step is right."""
        return encode(self.trace)

    def is_right(self, output: str) -> bool:
        """Whether the asked registers are right after the asked number of steps."""
        values = dict(self.start)
        steps = output.partition(END)[0].split(".")
        if len(steps) <= self.steps:
            return False
        for step in steps[: self.steps]:
            taken = _STEP.fullmatch(step)
            if taken is None:
                return False
            if taken[2] is not None:
                values[taken[1]] = int(taken[2])
        return all(values[name] == self.end[name] for name in self.asked)


def make_program(rng: random.Random, lines: int, registers: int, steps: int) -> Program:
    """Draws a problem; all with the same numbers have the same lengths in tokens.

    Args:
        rng: what to draw from.
        lines: of the program, 2 to 25.
        registers: 4 to 26.
        steps: that are executed.
    """
    while True:
        labels = rng.sample(LABELS, lines)
        names = rng.sample(string.ascii_lowercase, registers)
        start = {name: rng.randrange(10) for name in names}
        program = [_draw_line(rng, names, labels) for _ in labels]
        trace, end, visited = _execute(program, labels, start, steps)
        if len(visited) >= VISITED * min(lines, steps):
            break
    asked = rng.sample(names, ASKED)
    listing = "".join(f"{_written(label, line)};" for label, line in zip(labels, program, strict=True))
    registers_at_start = ",".join(f"{name}:{value}" for name, value in start.items())
    return Program(
        prompt=f"{listing}{registers_at_start}?{','.join(asked)}#",
        trace=trace,
        steps=steps,
        start=start,
        asked=asked,
        end=end,
    )


def _draw_line(rng: random.Random, names: Sequence[str], labels: Sequence[str]) -> Assignment | Jump:
    target, left, right = rng.choice(names), rng.choice(names), rng.choice(names)
    if rng.random() < JUMPS:
        return Jump(target, left, rng.choice(labels))
    if rng.random() < DIGITS:
        return Assignment(target, left, rng.choice("+-*"), str(rng.randrange(10)))
    return Assignment(target, left, rng.choice("+-*"), right)


def _written(label: str, line: Assignment | Jump) -> str:
    if isinstance(line, Jump):
        return f"#{label}{line.left}?{line.right}#{line.to}"
    return f"#{label}{line.target}={line.left}{line.operation}{line.right}"


def _execute(
    program: Sequence[Assignment | Jump], labels: Sequence[str], start: Mapping[str, int], steps: int
) -> tuple[str, dict[str, int], set[int]]:
    """Returns: the trace, the registers at its end, and the indices of the lines that were executed."""
    values, at, trace, visited = dict(start), 0, [], set()
    for _ in range(steps):
        line, written = program[at], _written(labels[at], program[at])
        visited.add(at)
        at = (at + 1) % len(program)
        if isinstance(line, Jump):
            left, right = values[line.left], values[line.right]
            taken = "y" if left < right else "n"
            trace.append(f"{written} {line.left}:{left} {line.right}:{right} ?:{taken}.")
            if taken == "y":
                at = labels.index(line.to)
        else:
            left = values[line.left]
            right = int(line.right) if line.right.isdigit() else values[line.right]
            values[line.target] = OPERATIONS[line.operation](left, right)
            known = f"{line.left}:{left} {line.right}:{right}"
            trace.append(f"{written} {known} {line.target}:{values[line.target]}.")
    return "".join(trace), values, visited


class ProgramOptions(TaskOptions):
    lines: Annotated[int, Field(ge=2, le=25)] = 16
    registers: Annotated[int, Field(ge=4, le=26)] = 12
    steps: Annotated[int, Field(ge=1)] = 96


class ProgramTask:
    opens_thinking = True
    judges_thinking = True

    def __init__(self, options: ProgramOptions) -> None:
        self._options = options
        self._make = partial(
            make_program, lines=options.lines, registers=options.registers, steps=options.steps
        )
        self.decode: Decode | None = decode
        # All steps have the same length.
        self.max_tokens: int | None = options.steps * len(encode("#ab=c+d c:1 d:1 b:1."))

    def describe(self) -> dict[str, Any]:
        return {"name": "program", **self._options.model_dump()}

    def problems(self, count: int, seed: int) -> list[Problem]:
        rng = random.Random(seed)
        drawn = [self._make(rng) for _ in range(count)]
        return [Problem(str(i), each.prompt_ids, each.is_right) for i, each in enumerate(drawn)]
