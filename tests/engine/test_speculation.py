"""n-gram speculation: answers, rounds and probabilities are those without it, drafts right or wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import texts
from engine_process import Ask, Engine, Run, Settings
from support.identical import assert_alike

TOKENS = 130
#: Prompt, budget, buffer, policy; the last keeps its full cache.
CASES = (
    (texts.multiples(7), 64, 24, "rkv"),
    (texts.KING, 48, 8, "invariant"),
    (texts.squares(5), 64, 12, "snapkv"),
    (texts.COUNTDOWN, 72, 24, "recency"),
    (texts.multiples(3), 0, 24, "rkv"),
)


@pytest.fixture(scope="module")
def asks(encode: texts.Encode) -> list[Ask]:
    return [
        Ask(encode(prompt), TOKENS, {"rkv_budget": budget, "rkv_buffer": buffer, "rkv_policy": policy})
        for prompt, budget, buffer, policy in CASES
    ]


@pytest.fixture(scope="module")
def plain(rkv: Engine, asks: list[Ask]) -> Run:
    return rkv.run(asks)


@pytest.mark.parametrize(("drafts", "pages"), [(15, 512), (4, 15)])
def test_drafts_change_no_answer(
    start_engine: Callable[[Settings], Engine], asks: list[Ask], plain: Run, drafts: int, pages: int
) -> None:
    """Tokens, logprobs and rounds are those without drafts, in fewer steps; with preemptions, too."""
    run = start_engine(Settings(drafts=drafts, pages=pages)).run(asks)

    assert_alike(run.answers, plain.answers)
    for answer, expected in zip(run.answers, plain.answers, strict=True):
        for what in ("compactions", "evicted_tokens"):
            assert answer.result[what] == expected.result[what]
    assert all(answer.result["compactions"] >= 3 for answer in plain.answers[:-1])
    if pages > 100:
        # Of a request that repeats itself.
        ends = [max(n for n, step in enumerate(each.steps) if 0 in step.computed) for each in (run, plain)]
        assert ends[0] < 0.8 * ends[1]
    else:
        assert run.preemptions() >= 2


def test_a_newcomer_of_one_token_is_not_cut(
    start_engine: Callable[[Settings], Engine], rkv: Engine, encode: texts.Encode
) -> None:
    """A request that finds all but one token in the cache, beside others, starts in spite of a round that is
    due within the drafts that vLLM pads it with."""
    other = Ask(encode(texts.multiples(7)), 60)
    short = {"rkv_budget": 24, "rkv_buffer": 16, "rkv_policy": "recency"}
    prompt = encode(texts.squares(5))[:33]  # a page and one token; due at 40
    asks = [other, Ask(prompt, 40, short), Ask(prompt, 40, short, arrives_at=20)]

    run = start_engine(Settings(drafts=15)).run(asks)

    assert_alike(run.answers, rkv.run(asks).answers)
    assert run.answers[2].result["compactions"] >= 2


def test_a_bad_setting_is_refused_at_the_front_end(
    start_engine: Callable[[Settings], Engine], encode: texts.Encode
) -> None:
    """Requests are looked at though vLLM's V1 runner lets no logits processor be named beside drafts."""
    run = start_engine(Settings(drafts=15)).run([Ask(encode(texts.KING), 4, {"rkv_budget": "many"})])

    assert run.answers[0].error is not None and "rkv_budget" in run.answers[0].error
