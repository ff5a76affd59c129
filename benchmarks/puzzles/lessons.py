"""What the model learns from: whole conversations in rows of tokens, made while it learns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import reasoning_gym
import torch
from torch.utils.data import IterableDataset, get_worker_info

from puzzles.chains import Chain
from puzzles.questions import HELD_OUT_SEED, LEARNED_SEED, PUZZLES
from puzzles.tokenizer import encode
from rkv_vllm.evaluation.tasks.reasoning_gym import PROMPT, ReasoningGymTask

#: A label that counts for nothing.
IGNORED = -100
#: How far the seeds of two workers lie apart: more than the questions that one of them makes.
SEEDS_OF_A_WORKER = 1 << 32


def opened(prompt: str) -> str:
    """A user's words up to the opened thinking, as the tokenizer's chat template has them."""
    return f"<bos><user>{prompt}<think>"


def solution(chain: Chain) -> str:
    """All that the model writes."""
    return f"{chain.thinking}</think><answer>{chain.answer}</answer><eos>"


def longest_conversation(largest: Mapping[str, int]) -> int:
    """Tokens of the longest of some conversations of the largest sizes.

    Raises: ValueError where a puzzle is too large for its solver.
    """
    lengths = []
    for name, size in largest.items():
        puzzle = PUZZLES[name]
        for problem in ReasoningGymTask(name, puzzle.of_sizes(size, size)).problems(64, HELD_OUT_SEED):
            prompt = str(problem.prompt)
            lengths.append(len(encode(opened(prompt) + solution(puzzle.solve(prompt)))))
    return max(lengths)


class Lessons(IterableDataset):
    """Rows of conversations, half of them of the largest sizes. Answers are learned, questions are not.

    Yields: token ids [length] and labels [length], the ids that follow, or IGNORED; both int16, since many
    rows wait in shared memory.
    """

    def __init__(self, length: int, largest: Mapping[str, int], seed: int) -> None:
        """
        Args:
            length: of a row, in tokens.
            largest: the sizes to learn, by the puzzle's name.
            seed: another one makes other rows.
        """
        self._length, self._largest, self._seed = length, largest, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        number = worker.id if worker is not None else 0
        first = LEARNED_SEED + (self._seed << 40) + number * SEEDS_OF_A_WORKER
        conversations = self._conversations(first)
        while True:
            ids: list[int] = []
            learned: list[bool] = []
            while len(ids) <= self._length:
                asked, answered = next(conversations)
                ids += asked + answered
                learned += [False] * len(asked) + [True] * len(answered)
            row = torch.tensor(ids[: self._length + 1], dtype=torch.int16)
            labels = row.masked_fill(~torch.tensor(learned[: self._length + 1]), IGNORED)
            yield row[:-1], labels[1:]

    def _conversations(self, first: int) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids of prompts and solutions."""
        rng = random.Random(first)
        datasets = [
            (PUZZLES[name], reasoning_gym.create_dataset(name, seed=first, size=1, **options))
            for name, largest in self._largest.items()
            for options in (
                PUZZLES[name].of_sizes(PUZZLES[name].smallest, largest),
                PUZZLES[name].of_sizes(largest, largest),
            )
        ]
        for i in range(SEEDS_OF_A_WORKER):
            puzzle, dataset = rng.choice(datasets)
            question = dataset[i]["question"]
            prompt = PROMPT.replace("{question}", question)
            yield encode(opened(prompt)), encode(solution(puzzle.solve(question)))
