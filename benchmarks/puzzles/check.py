"""How often a model in training is right: greedy answers to questions that it does not learn from."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch

from puzzles.lessons import opened
from puzzles.model import Llama
from puzzles.questions import HELD_OUT_SEED, PUZZLES
from puzzles.tokenizer import EOS, PAD, decode, encode
from rkv_vllm.evaluation.tasks.reasoning_gym import ReasoningGymTask
from rkv_vllm.evaluation.thinking import after_thinking

#: Whether all have ended is asked once in so many tokens: it waits for the GPU.
ASK_EVERY = 32


def right_answers(model: Llama, largest: Mapping[str, int], count: int, most_tokens: int) -> dict[str, float]:
    """
    Args:
        model: is left as it is; on a GPU its copy in bfloat16 is asked.
        largest: the size of the questions, by the puzzle's name.
        count: questions of each puzzle.
        most_tokens: of a question and its answer.

    Returns: the share of right answers, by the puzzle's name.
    """
    problems = {
        name: ReasoningGymTask(name, PUZZLES[name].of_sizes(size, size)).problems(count, HELD_OUT_SEED)
        for name, size in largest.items()
    }
    asked = [encode(opened(str(problem.prompt))) for each in problems.values() for problem in each]
    answers = iter(greedy(_as_served(model), asked, most_tokens))
    right = {}
    for name, each in problems.items():
        judged = [problem.is_right(after_thinking(next(answers), True) or "") for problem in each]
        right[name] = sum(judged) / count
    return right


@torch.inference_mode()
def greedy(model: Llama, prompts: list[list[int]], most_tokens: int) -> list[str]:
    """What the model writes to each prompt, without its end.

    All are at the same position in every step, so that none needs padding: the shorter prompts are answered
    while the longer ones are still read.
    """
    device = model.lm_head.weight.device
    ids = torch.full((len(prompts), most_tokens), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    caches = model.caches(len(prompts), most_tokens)
    for at in range(1, most_tokens):
        chosen = model(ids[:, at - 1 : at], caches)[:, -1].argmax(-1)
        answered = lengths <= at
        ids[:, at] = torch.where(answered & ~ended, chosen, ids[:, at])
        ended |= answered & (chosen == EOS)
        if at % ASK_EVERY == 0 and ended.all():
            break
    written = [row[len(prompt) :] for row, prompt in zip(ids.tolist(), prompts, strict=True)]
    return [decode(row[: row.index(EOS)] if EOS in row else row) for row in written]


def _as_served(model: Llama) -> Llama:
    on_gpu = model.lm_head.weight.device.type == "cuda"
    return deepcopy(model).bfloat16() if on_gpu else model
