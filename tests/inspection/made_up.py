"""Reports of made-up requests, as large as one likes."""

from __future__ import annotations

import numpy as np

from rkv_vllm.inspection.report import Forgotten, Inspection, Packed, Run, Setting

WINDOW = 8
WORDS = (" the", " of", " and", " 17", " therefore", " x", " =", ",", ".\n", " so", " let", "<b>&")


def report(
    *, tokens: int, layers: int, heads: int, budgets: tuple[int, ...], buffer: int = 128, prompt: int = 100
) -> Inspection:
    """Requests of so many tokens whose heads each forget by chance, as much as their budget wants."""
    chance = np.random.default_rng(7)
    text = [WORDS[word] for word in chance.integers(len(WORDS), size=tokens)]
    full = Run(setting=None, tokens=text, first_difference=None, forgotten=None, kl=None)
    runs = [full]
    for budget in budgets:
        difference = min(prompt + budget, tokens - 1)
        other = text[:difference] + [" other"] + text[difference + 1 :]
        runs.append(
            Run(
                setting=Setting(policy="rkv", budget=budget, buffer=buffer, protect=0),
                tokens=other,
                first_difference=difference,
                forgotten=_forgotten(chance, tokens - 1, layers, heads, budget, buffer),
                kl=[float(kl) for kl in chance.exponential(0.1, size=tokens - prompt).round(4)],
            )
        )
    return Inspection(
        command="rkv-vllm inspect --made-up",
        model="made-up",
        device="none",
        dtype="bfloat16",
        versions={},
        granularity="token",
        scope="head",
        order="temporal",
        mix_lambda=0.1,
        prompt_tokens=prompt,
        layers=layers,
        heads=heads,
        runs=runs,
    )


def _forgotten(
    chance: np.random.Generator, tokens: int, layers: int, heads: int, budget: int, buffer: int
) -> Forgotten:
    rows = layers * heads
    left = np.zeros((rows, tokens), dtype=np.int32)
    held = np.tile(np.arange(budget), (rows, 1))  # positions, of each row
    rounds = list(range(budget + buffer, tokens, buffer))
    for number, length in enumerate(rounds, start=1):
        held = np.concatenate((held, np.tile(np.arange(length - buffer, length), (rows, 1))), axis=1)
        scores = chance.random(held.shape, dtype=np.float32)
        scores[:, -WINDOW:] = 2.0
        order = np.argpartition(scores, buffer, axis=1)
        np.put_along_axis(left, np.take_along_axis(held, order[:, :buffer], axis=1), number, axis=1)
        held = np.sort(np.take_along_axis(held, order[:, buffer:], axis=1), axis=1)
    shape = (layers, heads, tokens)

    def shares() -> Packed:
        return Packed.pack(chance.integers(100, size=shape))

    return Forgotten(
        rounds=rounds,
        left=Packed.pack(left.reshape(shape)),
        importance=shares(),
        redundancy=shares(),
        match=Packed.pack(chance.integers(-1, tokens, size=shape), missing=-1),
    )
