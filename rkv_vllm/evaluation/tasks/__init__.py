"""The tasks, by the name that the command line gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError

from rkv_vllm.evaluation.tasks.base import Decode as Decode
from rkv_vllm.evaluation.tasks.base import Problem as Problem
from rkv_vllm.evaluation.tasks.base import Task as Task
from rkv_vllm.evaluation.tasks.derivation import DerivationOptions, DerivationTask
from rkv_vllm.evaluation.tasks.jsonl import JsonlOptions, JsonlTask
from rkv_vllm.evaluation.tasks.program import ProgramOptions, ProgramTask
from rkv_vllm.evaluation.tasks.reasoning_gym import ReasoningGymTask

NAMES = "derivation, program, jsonl:FILE, reasoning-gym:NAME"


def make_task(name: str, options: Mapping[str, str]) -> Task:
    """
    Args:
        name: `derivation`, `program`, `jsonl:FILE` or `reasoning-gym:NAME`.
        options: of that task, as words.

    Raises: ValueError that names the task or the option that is wrong; OSError for a file that cannot be
    read.
    """
    kind, _, argument = name.partition(":")
    try:
        if name == "derivation":
            return DerivationTask(DerivationOptions.model_validate(options))
        if name == "program":
            return ProgramTask(ProgramOptions.model_validate(options))
        if kind == "jsonl" and argument:
            return JsonlTask(Path(argument), JsonlOptions.model_validate(options))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"task-option {problem['loc'][0]}: {problem['msg']}") from None
    if kind == "reasoning-gym" and argument:
        return ReasoningGymTask(argument, {key: yaml.safe_load(word) for key, word in options.items()})
    raise ValueError(f"task: takes {NAMES}, not {name!r}")
