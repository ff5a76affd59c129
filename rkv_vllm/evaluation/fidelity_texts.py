"""What is decoded: windows of given texts, or of texts that the model wrote itself. No vLLM here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

#: What own texts are asked for unless a file says otherwise: long work that comes back to its details.
INSTRUCTIONS = (
    "A tank holds 480 litres. One pipe fills it in 6 hours, another in 8, and a drain empties it in 12. "
    "All three are open from 7:00 on. When is it full? Show every step, then solve it in a second way.",
    "Five friends sit in a row and each owns another pet. Make up a puzzle with clues about them, "
    "and solve it by trying one case after another.",
    "Show that the square root of 3 is irrational. Then go through your proof again and look for gaps.",
    "Write a Python program that finds the shortest way through a maze, run it by hand on a small maze, "
    "and keep track of every variable.",
    "Plan a ten-day journey by train for a family of four with 2,000 euros. Add up the costs of every day.",
    "Tell the story of a clockmaker who finds a letter inside an old clock. "
    "Let every character and object of the beginning matter in the end.",
    "Explain how a refrigerator works, first to a child, then to an engineer, and compare both explanations.",
    "Make a table of twelve plants with their height, colour and season, "
    "then describe a garden bed for each month from that table.",
)
#: Of the sampling of own texts, unless another one is asked for.
TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of text: `prompt` is read, and then `forced` decoded token by token."""

    text: str
    prompt: tuple[int, ...]
    forced: tuple[int, ...]


def cut(
    text: str, tokens: Sequence[int], prefix: Sequence[int], prompt: int, forced: int, most: int
) -> list[Window]:
    """Cuts a text's tokens into windows, one after the other; what is left at the end is not used.

    Args:
        text: its name.
        tokens: of the whole text.
        prefix: tokens that begin every prompt, such as the model's beginning of a sequence.
        prompt: tokens of a prompt, the prefix included.
        forced: tokens to decode.
        most: windows at most.

    Raises: ValueError where not one window can be filled, or the prefix leaves no room in the prompt.
    """
    if prompt <= len(prefix):
        raise ValueError(f"--prompt: takes more than the model's own {len(prefix)} tokens, not {prompt}")
    own = prompt - len(prefix)
    step = own + forced
    count = min(most, len(tokens) // step)
    if count < 1:
        raise ValueError(f"--text: {text} has {len(tokens)} tokens, and one window takes {step}")
    starts = [index * step for index in range(count)]
    return [
        Window(text, (*prefix, *tokens[start : start + own]), tuple(tokens[start + own : start + step]))
        for start in starts
    ]


class WrittenText(BaseModel):
    """What a model wrote.

    Attributes:
        instruction: that it was asked.
        seed: of the sampling of this text.
        instruction_tokens: how many of the first tokens are the instruction in the chat template.
        tokens: ids of the instruction's tokens and of all that were written.
        text: the written tokens as text, special tokens included.
    """

    instruction: str
    seed: int
    instruction_tokens: int
    tokens: list[int]
    text: str


class OwnText(BaseModel):
    """Texts of a model, and all that it takes to have them written again.

    Attributes:
        model: that wrote them.
        temperature, seed: of the sampling; every text's seed follows from this one.
        sampling_defaults: what the model's authors set for sampling, such as top_p; all but their temperature
            was in force.
        forbidden_tokens: ids that were never sampled, besides the model's end tokens.
    """

    model: str
    temperature: float
    seed: int
    sampling_defaults: dict[str, Any]
    forbidden_tokens: list[int]
    texts: list[WrittenText]

    def windows(self, prompt: int, forced: int, most: int) -> list[Window]:
        """The first `prompt` + `forced` tokens of each of the first `most` texts.

        Raises: ValueError where an instruction does not fit into the prompt, or a text is shorter.
        """
        windows = []
        for number, text in enumerate(self.texts[:most], start=1):
            check_fits(text.instruction, text.instruction_tokens, prompt)
            length = prompt + forced
            if len(text.tokens) < length:
                raise ValueError(
                    f"--tokens: own text {number} has {len(text.tokens)} tokens, and a window takes {length}"
                )
            name = f"own text {number}"
            windows.append(Window(name, tuple(text.tokens[:prompt]), tuple(text.tokens[prompt:length])))
        return windows


def check_fits(instruction: str, tokens: int, prompt: int) -> None:
    """Raises: ValueError where an instruction of so many tokens is longer than a window's prompt."""
    if tokens > prompt:
        raise ValueError(
            f"--prompt: takes at least {tokens} tokens for this instruction in the chat template, "
            f"not {prompt}: {instruction!r}"
        )


@dataclass(frozen=True)
class GivenTexts:
    """`texts`: by name."""

    texts: Mapping[str, str]


@dataclass(frozen=True)
class TextsToWrite:
    """What the model is asked: the instructions in turn, until there are `count` texts."""

    instructions: Sequence[str]
    count: int
    temperature: float
    seed: int

    def requests(self) -> list[tuple[str, int]]:
        """Instruction and seed of each text; a larger `count` leaves the first as they are."""
        seeds = np.random.SeedSequence(self.seed).generate_state(self.count).tolist()
        return [(self.instructions[index % len(self.instructions)], seed) for index, seed in enumerate(seeds)]


Source = GivenTexts | TextsToWrite | OwnText


def source_of(
    texts: Sequence[Path],
    own_text: bool,
    own_text_from: Path | None,
    instructions: Path | None,
    temperature: float | None,
    seed: int,
    windows: int,
) -> Source:
    """What the options of these names ask for; files are read.

    Raises: ValueError that names a wrong option; OSError where a file cannot be read.
    """
    given = {"--text": bool(texts), "--own-text": own_text, "--own-text-from": own_text_from is not None}
    chosen = [option for option, is_given in given.items() if is_given]
    if len(chosen) != 1:
        raise ValueError(f"takes one of {', '.join(given)}, not {' and '.join(chosen) or 'none of them'}")
    for option, value in (("--instructions", instructions), ("--temperature", temperature)):
        if value is not None and not own_text:
            raise ValueError(f"{option}: is for --own-text, not for {chosen[0]}")
    if own_text_from is not None:
        return _written(own_text_from)
    if not own_text:
        return GivenTexts({path.name: _read("--text", path) for path in texts})
    asked = INSTRUCTIONS if instructions is None else _lines(instructions)
    if temperature == 0 and windows > len(asked):
        raise ValueError(
            f"--temperature: greedy texts of an instruction are all the same, and {windows} windows "
            f"take {len(asked)} instructions in turn"
        )
    return TextsToWrite(asked, windows, TEMPERATURE if temperature is None else temperature, seed)


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _read("--instructions", path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--instructions: {path} is empty")
    return lines


class _Result(BaseModel):
    """The part of a result file that is read again."""

    own_text: OwnText | None = None


def _written(path: Path) -> OwnText:
    try:
        own = _Result.model_validate_json(_read("--own-text-from", path)).own_text
    except ValidationError:
        own = None
    if own is None:
        raise ValueError(f"--own-text-from: {path} is no result of `rkv-vllm fidelity --own-text`")
    return own


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{option}: {path} is not text in UTF-8") from None
