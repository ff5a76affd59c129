"""Questions and answers from a file of JSON lines: bring your own."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rkv_vllm.evaluation.tasks.base import Decode, Problem, TaskOptions
from rkv_vllm.evaluation.tasks.matching import COMPARE, Match, number

PLACE = "{question}"


class JsonlOptions(TaskOptions):
    """`question` and `answer` are names of the fields; `prompt` has `{question}` where the question goes."""

    match: Match = "exact"
    question: str = "question"
    answer: str = "answer"
    prompt: str = PLACE


class JsonlTask:
    max_tokens: int | None = None
    opens_thinking = False
    judges_thinking = False
    decode: Decode | None = None

    def __init__(self, path: Path, options: JsonlOptions) -> None:
        """Raises: ValueError that names the option, or the line of the file, that is wrong."""
        if options.match == "math-verify" and find_spec("math_verify") is None:
            raise ValueError(
                "match: math-verify needs the package math-verify: pip install 'rkv-vllm[eval-tasks]'"
            )
        if PLACE not in options.prompt:
            raise ValueError(f"prompt: has no {PLACE}")
        self._path, self._options = path, options
        text = path.read_bytes()
        self._digest = hashlib.sha256(text).hexdigest()
        self._problems = list(self._read(text.decode()))
        if not self._problems:
            raise ValueError(f"{path}: holds no question")

    def describe(self) -> dict[str, Any]:
        return {
            "name": "jsonl",
            "file": self._path.name,
            "sha256": self._digest,
            **self._options.model_dump(),
        }

    def problems(self, count: int, seed: int) -> list[Problem]:
        drawn = list(self._problems)
        random.Random(seed).shuffle(drawn)
        return drawn[:count]

    def _read(self, text: str) -> Iterator[Problem]:
        for index, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            where = f"{self._path}, line {index}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            question, answer = self._field(entry, "question", where), self._field(entry, "answer", where)
            if self._options.match == "numeric" and number(answer) is None:
                raise ValueError(f"{where}: {self._options.answer} ends with no number: {answer!r}")
            compare = partial(COMPARE[self._options.match], answer)
            yield Problem(str(index), self._options.prompt.replace(PLACE, question), compare)

    def _field(self, entry: Any, option: str, where: str) -> str:
        name = getattr(self._options, option)
        if not isinstance(entry, dict) or name not in entry:
            raise ValueError(f"{where}: has no field {name!r} (name it with --task-option {option}=NAME)")
        value = entry[name]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} takes text or a number, not {json.dumps(value)[:40]}")
        return str(value)
