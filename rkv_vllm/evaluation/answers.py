"""One line of JSON for every answer: written as it comes, and read again by a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

#: Setting, problem and number of the sample.
Key = tuple[str, str, int]


class Answer(BaseModel):
    """`answer` is what was checked: the text behind the thinking; `output` is all that was generated.

    `truncated`: stopped by the limit on tokens, and wrong for that reason. The fields behind it are what the
    engine reported about this request's cache.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    setting: str
    problem: str
    sample: int
    right: bool
    truncated: bool
    prompt_tokens: int
    output_tokens: int
    budget: int | Literal["auto", "full"]
    min_budget: int | None = None
    full_cache_tokens: int | None = None
    switches: list[str] | None = None
    policy: str | None
    buffer: int | None
    protect: int | None = None
    compactions: int
    evicted_tokens: int
    peak_pages: int
    pages_without_compaction: int
    answer: str
    output: str

    @property
    def key(self) -> Key:
        return self.setting, self.problem, self.sample


class AnswerLog:
    """The answers of a run, in memory and in a file.

    A last line that a killed run left unfinished is cut off, and its answer will be asked for again.
    """

    def __init__(self, path: Path) -> None:
        """Raises: ValueError where the file holds something else."""
        self._answers: dict[Key, Answer] = {}
        if path.exists():
            written = path.read_bytes()
            complete = written[: written.rfind(b"\n") + 1]
            for number, line in enumerate(complete.splitlines(), 1):
                try:
                    self._keep(Answer.model_validate_json(line))
                except ValidationError as error:
                    raise ValueError(f"{path}, line {number}: {error.errors()[0]['msg']}") from None
            if complete != written:
                path.write_bytes(complete)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __contains__(self, key: Key) -> bool:
        return key in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answer: Answer) -> None:
        self._keep(answer)
        self._file.write(json.dumps(answer.model_dump(), ensure_ascii=False) + "\n")
        self._file.flush()

    def of(self, setting: str, problems: Iterable[str], samples: int) -> list[list[Answer]]:
        """The answers there are, by problem; problems without one are left out."""
        found = (
            [
                self._answers[key]
                for sample in range(samples)
                if (key := (setting, problem, sample)) in self._answers
            ]
            for problem in problems
        )
        return [answers for answers in found if answers]

    def close(self) -> None:
        self._file.close()

    def _keep(self, answer: Answer) -> None:
        self._answers[answer.key] = answer
