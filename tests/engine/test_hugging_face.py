"""Compacted generation against transformers with the float64 reference of the algorithm."""

from __future__ import annotations

import pytest
import texts
from engine_process import Ask, Engine, Run
from hf_reference import HfReference

POLICIES = ("rkv", "invariant", "recency")
#: Prompt, budget, buffer. The last prompt is longer than budget + buffer: the first compaction follows it.
#: In none do two candidates at the edge of a budget have scores within rounding of one another.
CASES = {
    "numbers": (texts.multiples(7), 64, 24),
    "prose": (texts.KING, 48, 24),
    "long prompt": (texts.squares(20), 96, 24),
}
TOKENS = 170


@pytest.fixture(scope="module")
def asks(encode: texts.Encode) -> dict[tuple[str, str], Ask]:
    return {
        (case, policy): Ask(
            encode(prompt), TOKENS, {"rkv_budget": budget, "rkv_buffer": buffer, "rkv_policy": policy}
        )
        for case, (prompt, budget, buffer) in CASES.items()
        for policy in POLICIES
    }


@pytest.fixture(scope="module")
def run(rkv: Engine, asks: dict[tuple[str, str], Ask]) -> Run:
    return rkv.run(list(asks.values()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_compacted_generation_equals_transformers(
    reference: HfReference, asks: dict[tuple[str, str], Ask], run: Run, case: str, policy: str
) -> None:
    """Every token over at least five compactions is the one that transformers predicts, with its logprob."""
    index = list(asks).index((case, policy))
    ask, answer = asks[case, policy], run.answers[index]
    _, budget, buffer = CASES[case]

    teaching = reference.teach(ask.prompt, answer.tokens, budget=budget, buffer=buffer, policy=policy)

    assert len(teaching.compacted_at) >= 5
    assert len(teaching.compacted_at) == answer.result["compactions"] == run.compactions(index)
    assert teaching.logprobs.argmax(dim=-1).tolist() == answer.tokens
    assert teaching.worst_difference(answer.tokens, answer.logprobs) < 1e-3


def test_first_compaction_of_a_long_prompt_follows_it_at_once(
    asks: dict[tuple[str, str], Ask], run: Run
) -> None:
    """A prompt longer than budget + buffer is read whole, and compacted before anything is decoded."""
    for index, (case, policy) in enumerate(asks):
        if case == "long prompt":
            lengths = [step.compacted[index] for step in run.steps if index in step.compacted]
            assert lengths[0] == len(asks[case, policy].prompt)
            assert set(lengths[1:]) == {96 + 24}


def test_the_comparison_tells_policies_apart(
    reference: HfReference, asks: dict[tuple[str, str], Ask], run: Run
) -> None:
    """Output of `rkv` measured against a reference that keeps other tokens is far outside the tolerance."""
    index = list(asks).index(("prose", "rkv"))
    ask, answer = asks["prose", "rkv"], run.answers[index]

    teaching = reference.teach(ask.prompt, answer.tokens, budget=48, buffer=24, policy="recency")

    assert teaching.worst_difference(answer.tokens, answer.logprobs) > 0.1
