"""Requests that keep their full cache until memory is short, on a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import texts
from engine_process import Ask, Engine, Run, Settings
from hf_reference import HfReference
from support.identical import assert_alike, assert_bit_identical

AUTO = {"rkv_budget": "auto", "rkv_min_budget": 48, "rkv_buffer": 24}
POLICIES = ("rkv", "invariant", "recency")
#: Between budget + buffer and the end; at a page's edge, one behind it, and behind the prompt at once.
SWITCHES = (128, 129, 1)
TOKENS = 170


def test_auto_in_a_large_pool_is_stock(rkv: Engine, stock: Engine, encode: texts.Encode) -> None:
    """While memory is never short, tokens and logprobs are stock's to the bit, and the result says why."""
    prompts = [encode(text) for text in (texts.multiples(7), texts.KING, texts.squares(40))]
    auto, plain = ([Ask(prompt, 90, extra) for prompt in prompts] for extra in (AUTO, {}))

    run = rkv.run(auto)

    assert_bit_identical(run.answers, stock.run(plain).answers)
    for answer in run.answers:
        assert answer.result["reason"] == "memory was never short"
        assert (answer.result["budget"], answer.result["min_budget"]) == ("auto", 48)
        assert answer.result["compactions"] == 0 and "full_cache_tokens" not in answer.result


@pytest.fixture(scope="module")
def asks(encode: texts.Encode) -> dict[tuple[str, int], Ask]:
    return {
        (policy, switch): Ask(
            encode(texts.KING), TOKENS, {**AUTO, "rkv_policy": policy, "rkv_switch_at": switch}
        )
        for policy in POLICIES
        for switch in SWITCHES
    }


@pytest.fixture(scope="module")
def told(rkv: Engine, asks: dict[tuple[str, int], Ask]) -> Run:
    return rkv.run(list(asks.values()))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_switch_equals_transformers(
    reference: HfReference, asks: dict[tuple[str, int], Ask], told: Run, policy: str, switch: int
) -> None:
    """Every token before and after the switch is the one that transformers predicts, with its logprob."""
    index = list(asks).index((policy, switch))
    ask, answer = asks[policy, switch], told.answers[index]

    teaching = reference.teach(
        ask.prompt, answer.tokens, budget=48, buffer=24, policy=policy, switch_at=switch
    )

    assert teaching.compacted_at[0] == max(switch, 48 + 24, len(ask.prompt))
    assert teaching.compacted_at[0] == answer.result["full_cache_tokens"]
    assert len(teaching.compacted_at) == answer.result["compactions"] == told.compactions(index) >= 3
    assert teaching.logprobs.argmax(dim=-1).tolist() == answer.tokens
    assert teaching.worst_difference(answer.tokens, answer.logprobs) < 1e-3


@pytest.mark.parametrize("order", ["temporal", "score"])
def test_steps_equal_transformers(
    reference: HfReference,
    start_engine: Callable[[Settings], Engine],
    encode: texts.Encode,
    order: Literal["temporal", "score"],
) -> None:
    """A request that comes down in steps keeps, at each of them, what transformers keeps, in either order of
    survivors, of which each round has another number."""
    engine = start_engine(Settings(order=order))
    prompt = encode(texts.KING)
    steps = [(125, 62), (150, 52), (170, 48)]
    told = [f"{at}:{kept}" for at, kept in steps]
    for policy in ("invariant", "recency"):
        [answer] = engine.run(
            [Ask(prompt, 200, {**AUTO, "rkv_policy": policy, "rkv_switch_at": told})]
        ).answers
        teaching = reference.teach(
            prompt, answer.tokens, budget=48, buffer=24, policy=policy, order=order, steps=steps
        )
        assert answer.result["switches"] == told
        assert len(teaching.compacted_at) == answer.result["compactions"] > 3
        assert teaching.logprobs.argmax(dim=-1).tolist() == answer.tokens
        assert teaching.worst_difference(answer.tokens, answer.logprobs) < 1e-3


def test_what_pressure_did_can_be_done_again(
    rkv: Engine, start_engine: Callable[[Settings], Engine], encode: texts.Encode
) -> None:
    """In a small pool requests come down in steps of their own, nobody is preempted, and in a large pool,
    told those steps, each says the same."""
    small = start_engine(Settings(pages=31))
    prompts = [encode(texts.multiples(n)) for n in range(2, 12)]
    policies = [POLICIES[n % len(POLICIES)] for n in range(len(prompts))]

    run = small.run(
        [
            Ask(prompt, 200, {**AUTO, "rkv_policy": policy}, arrives_at=7 * n)
            for n, (prompt, policy) in enumerate(zip(prompts, policies, strict=True))
        ]
    )

    results = [answer.result for answer in run.answers]
    switched = [result["full_cache_tokens"] for result in results if result["compactions"]]
    assert run.preemptions() == 0
    assert len(set(switched)) >= 3
    again = rkv.run(
        [
            Ask(
                prompt,
                200,
                {**AUTO, "rkv_policy": policy, "rkv_switch_at": result["switches"]}
                if result["compactions"]
                else {"rkv_budget": 0},
            )
            for prompt, policy, result in zip(prompts, policies, results, strict=True)
        ]
    )
    assert_alike(again.answers, run.answers)
    assert [answer.result["compactions"] for answer in again.answers] == [
        result["compactions"] for result in results
    ]
