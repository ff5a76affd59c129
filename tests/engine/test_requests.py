"""Per-request settings, errors, aborts and results."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import texts
from engine_process import PAGE_SIZE, Ask, Engine, Run
from support.identical import assert_bit_identical

MIXED: tuple[dict[str, Any], ...] = (
    {"rkv_budget": 0},
    {"rkv_budget": 48, "rkv_buffer": 16},
    {},
    {"rkv_budget": 64, "rkv_buffer": 24, "rkv_policy": "recency"},
    {"rkv_budget": 96, "rkv_buffer": 16, "rkv_policy": "snapkv"},
    {"rkv_budget": 57, "rkv_buffer": 19, "rkv_policy": "keydiff"},
    {"rkv_budget": 44, "rkv_buffer": 16, "rkv_policy": "random"},
)
OFF = (0, 2)


def expected_compactions(prompt: int, generated: int, budget: int, buffer: int) -> list[int]:
    """Logical lengths at which compactions run; the last token generated is never computed."""
    first = max(prompt, budget + buffer)
    return list(range(first, prompt + generated - 1, buffer))


@pytest.fixture(scope="module")
def mixed_prompts(encode: texts.Encode) -> list[list[int]]:
    return [encode(texts.multiples(n + 3)) for n in range(len(MIXED))]


@pytest.fixture(scope="module")
def mixed_run(rkv: Engine, mixed_prompts: list[list[int]]) -> Run:
    return rkv.run([Ask(prompt, 90, extra) for prompt, extra in zip(mixed_prompts, MIXED, strict=True)])


def test_full_cache_beside_mixed_settings_is_stock(
    stock: Engine, mixed_prompts: list[list[int]], mixed_run: Run
) -> None:
    """Requests with a full cache keep stock's output to the bit beside five other budgets and policies."""
    stock_run = stock.run([Ask(prompt, 90) for prompt in mixed_prompts])

    assert len(mixed_run.answers) == len(stock_run.answers) == len(MIXED)
    for index in range(len(MIXED)):
        if index in OFF:
            assert_bit_identical([mixed_run.answers[index]], [stock_run.answers[index]])
        else:
            assert mixed_run.compactions(index) >= 1


def test_results_are_exact(mixed_prompts: list[list[int]], mixed_run: Run) -> None:
    """A finished request tells its settings, compactions, evicted tokens and pages, exactly."""
    run = mixed_run
    for index, (prompt, extra) in enumerate(zip(mixed_prompts, MIXED, strict=True)):
        computed = len(prompt) + 90 - 1
        budget, buffer = extra.get("rkv_budget") or None, extra.get("rkv_buffer")
        held = [step.pages[index] for step in run.steps if index in step.pages]
        rounds = expected_compactions(len(prompt), 90, budget, buffer) if budget and buffer else []
        assert run.answers[index].result == {
            "budget": budget,
            "buffer": buffer,
            "policy": extra.get("rkv_policy", "invariant") if budget else None,
            "protect": None,
            "compactions": len(rounds),
            "evicted_tokens": rounds[-1] - budget if rounds and budget else 0,
            "peak_pages": max(held),
            "pages_without_compaction": ceil(computed / PAGE_SIZE),
            "page_size": PAGE_SIZE,
            "reason": None if budget else "full cache",
        }
        assert run.compactions(index) == len(rounds)
        if budget and buffer:
            assert len(prompt) < budget + buffer
            assert max(held) <= ceil((budget + buffer) / PAGE_SIZE) + 1


def test_a_short_request_says_why_nothing_was_compacted(rkv: Engine, encode: texts.Encode) -> None:
    """A budget that a request never reached is reported with the reason, and no compaction."""
    run = rkv.run([Ask(encode(texts.KING), 5, {"rkv_budget": 64, "rkv_buffer": 16, "rkv_policy": "keydiff"})])

    result = run.answers[0].result
    assert (result["budget"], result["buffer"], result["policy"]) == (64, 16, "keydiff")
    assert (result["compactions"], result["evicted_tokens"], result["peak_pages"]) == (0, 0, 1)
    assert result["reason"] == "shorter than budget + buffer"


def test_protected_prompts_and_shares(rkv: Engine, encode: texts.Encode) -> None:
    """A protected prompt is counted in the request's own tokens, a share of its own longest length, and who
    protects more than its budget holds is refused alone."""
    prompt = encode(texts.multiples(7))
    share = {"rkv_budget": "50%", "rkv_buffer": 16, "rkv_policy": "recency"}
    budget = ceil((len(prompt) + 90) / 2)
    too_much = {"rkv_budget": len(prompt) + 8, "rkv_protect": "prompt"}
    assert len(prompt) + 8 < budget < len(prompt) + 90 - 16
    asks = [Ask(prompt, 90, share), Ask(prompt, 90, {**share, "rkv_protect": "prompt"})]

    run = rkv.run([*asks, Ask(prompt, 90, too_much)])

    plain, protected, refused = run.answers
    for answer, protect in ((plain, None), (protected, len(prompt))):
        assert (answer.result["budget"], answer.result["protect"]) == (budget, protect)
        assert answer.result["compactions"] == len(expected_compactions(len(prompt), 90, budget, 16)) > 1
    assert refused.finish_reason == "error" and refused.tokens == []
    assert f"at least {len(prompt) + 9}" in refused.result["reason"]
    (first,) = rkv.run([Ask(prompt, 90, {**share, "rkv_protect": 4})]).answers
    assert first.tokens == plain.tokens, "policy recency keeps the first four by itself"
    assert protected.tokens != plain.tokens


def test_the_result_of_several_answers_is_their_sum(rkv: Engine, encode: texts.Encode) -> None:
    """Proves that n = 3 in Python reports all three answers, as over HTTP, and not the last to finish."""
    ask = Ask(encode(texts.multiples(7)), 90, {"rkv_budget": 48, "rkv_buffer": 16}, seed=1)
    one = rkv.run([ask]).answers[0].result
    three = rkv.run([replace(ask, n=3)]).answers[0].result
    counts = ("compactions", "evicted_tokens", "pages_without_compaction")
    assert one["compactions"] > 0
    assert [three[count] for count in counts] == [3 * one[count] for count in counts]
    assert (three["sequences"], three["page_size"], three["reason"]) == (3, PAGE_SIZE, None)


def test_bad_settings_fail_their_own_request_only(rkv: Engine, encode: texts.Encode) -> None:
    """A wrong value is an error that names its field, for its request alone; those in flight finish."""
    prompt = encode(texts.multiples(7))
    good = [Ask(prompt, 40, {"rkv_budget": 48, "rkv_buffer": 16}), Ask(prompt + prompt, 40)]
    bad: dict[str, list[dict[str, Any]]] = {
        "rkv_budget takes": [{"rkv_budget": value} for value in ("x", 5, -1, 64.0, "0%")],
        "rkv_buffer takes": [{"rkv_buffer": 0}, {"rkv_budget": 64, "rkv_buffer": "16"}],
        "rkv_policy takes": [{"rkv_budget": 64, "rkv_policy": "best"}],
        "rkv_protect takes": [{"rkv_budget": 64, "rkv_protect": value} for value in (-1, "system", 1.0)],
        "rkv_foo is unknown": [{"rkv_foo": 1}],
    }
    expected = rkv.run(good)
    asks = list(good)
    messages = []
    for message, extras in bad.items():
        asks.extend(Ask(prompt, 40, extra, arrives_at=20) for extra in extras)
        messages.extend([message] * len(extras))

    run = rkv.run(asks)

    for answer, message in zip(run.answers[len(good) :], messages, strict=True):
        assert answer.error is not None
        assert message in answer.error
        assert answer.tokens == []
    for answer in run.answers[: len(good)]:
        assert answer.error is None
        assert answer.finish_reason == "length"
    assert_bit_identical(run.answers[: len(good)], expected.answers)


def test_aborted_requests_return_their_pages(rkv: Engine, encode: texts.Encode) -> None:
    """A client that leaves before, at or after a compaction gives back all pages in the next step."""
    prompt = encode(texts.multiples(7))  # due at 64 tokens, then every 16
    due = 64 - len(prompt)
    extra = {"rkv_budget": 48, "rkv_buffer": 16}
    leaving = [Ask(prompt, 200, extra, abort_after=due + late) for late in (-3, 0, 1, 2, 9, 17, 40)]
    staying = Ask(prompt, 70, extra)

    run = rkv.run([*leaving, staying])

    assert [answer.finish_reason for answer in run.answers] == ["abort"] * len(leaving) + ["length"]
    for index, ask in enumerate(leaving):
        assert len(run.answers[index].tokens) == ask.abort_after
        assert sum(index in step.pages for step in run.steps) == ask.abort_after
    assert run.steps[-1].pages.keys() == {len(leaving)}


def test_2097_tokens_within_a_budget_of_512(long_ask: Ask, long_run: Future[Run]) -> None:
    """Past its prompt, a request of 2,097 tokens never holds more than budget + buffer, and one page."""
    assert (long_ask.extra["rkv_budget"], long_ask.extra["rkv_buffer"]) == (512, 128)
    prompt, run = len(long_ask.prompt), long_run.result()
    assert prompt + len(run.answers[0].tokens) == 2097

    decoding = [step for step in run.steps if step.computed.get(0, 0) > prompt]
    rounds = expected_compactions(prompt, 1024, 512, 128)

    assert len(decoding) == 1023
    assert max(step.pages[0] for step in decoding) <= ceil((512 + 128) / PAGE_SIZE) + 1
    assert run.answers[0].result == {
        "budget": 512,
        "buffer": 128,
        "policy": "rkv",
        "protect": None,
        "compactions": len(rounds),
        "evicted_tokens": rounds[-1] - 512,
        "peak_pages": ceil(prompt / PAGE_SIZE),
        "pages_without_compaction": ceil(2096 / PAGE_SIZE),
        "page_size": PAGE_SIZE,
        "reason": None,
    }
    assert run.compactions(0) == len(rounds) == 8


def test_a_seed_gives_the_same_tokens_however_the_prompt_is_split(rkv: Engine, encode: texts.Encode) -> None:
    """Sampled requests whose prompts take several steps do not end the engine, and draw the same numbers."""
    long = encode(texts.squares(45))
    assert 512 < len(long) < 1024
    seeded = Ask(long, 20, {"rkv_budget": 64}, seed=7)
    before = Ask(encode(texts.squares(25)), 20)  # takes most of the first step's tokens

    (alone,) = rkv.run([seeded]).answers
    _, behind = rkv.run([before, seeded]).answers

    assert alone.tokens == behind.tokens
    (other,) = rkv.run([Ask(long, 20, {"rkv_budget": 64}, seed=8)]).answers
    assert other.tokens != alone.tokens
