"""Problems made and verified by the package reasoning-gym."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from rkv_vllm.evaluation.tasks.base import Decode, Problem

PROMPT = "{question}\n\nGive the final answer, and nothing else, between <answer> and </answer>."
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

#: What some verifiers raise for an answer that is not in the form they expect.
UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class ReasoningGymTask:
    max_tokens: int | None = None
    opens_thinking = False
    judges_thinking = False
    decode: Decode | None = None

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        """
        Args:
            name: of a dataset of reasoning-gym.
            options: of that dataset, such as `min_terms`.

        Raises: ValueError where the package is missing, or knows no such dataset or option.
        """
        try:
            import reasoning_gym
        except ImportError:
            raise ValueError(
                "task: reasoning-gym needs the package: pip install 'rkv-vllm[eval-tasks]'"
            ) from None
        if name not in reasoning_gym.factory.DATASETS:
            raise ValueError(f"task: reasoning-gym has no dataset {name!r}")
        self._name, self._options = name, options
        self._create = partial(reasoning_gym.create_dataset, name, **options)
        try:
            self._create(size=1, seed=0)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"task-option: reasoning-gym:{name} refuses {options}: {error}") from None

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {
            "name": f"reasoning-gym:{self._name}",
            "version": version("reasoning-gym"),
            "options": self._options,
        }

    def problems(self, count: int, seed: int) -> list[Problem]:
        dataset = self._create(size=count, seed=seed)

        def is_right(entry: dict[str, Any], answer: str) -> bool:
            tagged = TAGGED.findall(answer)
            try:
                score = dataset.score_answer((tagged[-1] if tagged else answer).strip(), entry)
            except UNREADABLE:
                return False
            return float(score) == 1.0

        return [
            Problem(str(i), PROMPT.replace("{question}", entry["question"]), partial(is_right, entry))
            for i, entry in enumerate(dataset)
        ]
