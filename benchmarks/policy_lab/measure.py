"""How often answers are right under many settings, all decoded side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from policy_lab.decoder import Choose, Decoder
from policy_lab.scores import scores
from policy_lab.settings import Settings
from rkv_vllm.evaluation.tasks import Problem, Task
from rkv_vllm.evaluation.thinking import after_thinking
from rkv_vllm.kernels import tiled
from rkv_vllm.settings.config import WINDOW

#: Steps between two looks at whether all answers have ended, which waits for the GPU.
_STEPS_BETWEEN_LOOKS = 64


def outcomes(
    decoder: Decoder,
    task: Task,
    problems: Sequence[Problem],
    settings: Sequence[Settings | None],
    *,
    budget: int,
    buffer: int,
    end_token: int,
) -> list[list[bool]]:
    """Whether each problem is answered right, by setting; None is the full cache, alone in its call.

    Raises: ValueError where prompts differ in length: rows are decoded in lockstep.
    """
    prompts = [list(problem.prompt) for problem in problems]
    if len({len(prompt) for prompt in prompts}) != 1:
        raise ValueError("the task's prompts differ in length")
    assert task.max_tokens is not None and task.decode is not None
    compacted = settings != [None]
    limit = budget + buffer if compacted else len(prompts[0]) + task.max_tokens
    rows = torch.tensor(prompts, device=decoder.device).repeat(len(settings), 1)
    chooses = list(_chooses(settings, len(problems), decoder, budget)) if compacted else []

    tokens = decoder.start(rows, max(limit, len(prompts[0])) + 1)
    written = [tokens]
    ended = tokens == end_token
    for step in range(1, task.max_tokens):
        if step % _STEPS_BETWEEN_LOOKS == 0 and bool(ended.all()):
            break
        if compacted and decoder.used >= limit:
            decoder.keep(budget, chooses)
        tokens = decoder.step(tokens)
        ended |= tokens == end_token
        written.append(tokens)

    right = judged(task, problems, torch.stack(written, dim=1))
    return [right[first : first + len(problems)] for first in range(0, len(right), len(problems))]


def judged(task: Task, problems: Sequence[Problem], written: torch.Tensor) -> list[bool]:
    """Whether each row of what was written, int64 [rows, tokens], is right; the problems repeat."""
    assert task.decode is not None
    right = []
    for row, answer in enumerate(written.tolist()):
        whole = task.decode(answer)
        text = whole if task.judges_thinking else after_thinking(whole, opened=task.opens_thinking)
        right.append(text is not None and problems[row % len(problems)].is_right(text))
    return right


def _chooses(
    settings: Sequence[Settings | None], count: int, decoder: Decoder, budget: int
) -> Iterator[tuple[slice, Choose]]:
    for index, each in enumerate(settings):
        assert each is not None, "a full cache cannot be decoded beside compacted ones"
        rows = slice(index * count, (index + 1) * count)
        yield rows, partial(survivors, each, decoder, budget)


def survivors(
    settings: Settings,
    decoder: Decoder,
    budget: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """int64 [B, H, budget]: the candidates of highest score and the window, in temporal order."""
    length = keys.shape[2]
    ranked = scores(settings, queries, keys, values, decoder.pairs, window=WINDOW)
    chosen = tiled.select(ranked, budget - WINDOW)
    window = torch.arange(length - WINDOW, length, device=keys.device)
    return torch.cat((chosen, window.expand(*chosen.shape[:2], -1)), dim=-1)
