"""One set of kept tokens for all layers, laid out best first, against transformers with the same choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import texts
from engine_process import Ask, Engine, Settings
from hf_reference import HfReference

TOKENS = 130
SCOPES: tuple[Literal["global", "head"], ...] = ("global", "head")
#: Prompt, budget, buffer, policy.
CASES = {
    "numbers": (texts.multiples(7), 64, 24, "rkv"),
    "prose": (texts.KING, 48, 24, "recency"),
}


def test_generation_with_shared_scores_equals_transformers(
    start_engine: Callable[[Settings], Engine],
    encode: texts.Encode,
    reference: HfReference,
) -> None:
    """Every token over several compactions is the one that transformers predicts, and no other scope's."""
    asks = [
        Ask(encode(prompt), TOKENS, {"rkv_budget": budget, "rkv_buffer": buffer, "rkv_policy": policy})
        for prompt, budget, buffer, policy in CASES.values()
    ]
    run = start_engine(Settings(scope="global", order="score")).run(asks)
    for (_, budget, buffer, policy), ask, answer in zip(CASES.values(), asks, run.answers, strict=True):
        differences = {}
        for scope in SCOPES if policy == "rkv" else SCOPES[:1]:
            teaching = reference.teach(
                ask.prompt,
                answer.tokens,
                budget=budget,
                buffer=buffer,
                policy=policy,
                scope=scope,
                order="score",
            )
            assert len(teaching.compacted_at) == answer.result["compactions"] >= 3
            differences[scope] = teaching.worst_difference(answer.tokens, answer.logprobs)
        assert differences["global"] < 1e-3
        assert policy != "rkv" or differences["head"] > 0.1
