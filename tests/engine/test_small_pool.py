"""A pool too small for the load: who is preempted, and that it does not show in the output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import texts
from engine_process import Ask, Engine, Settings
from support.identical import assert_alike

PAGES = 31


@pytest.fixture(scope="module")
def small_rkv(start_engine: Callable[[Settings], Engine]) -> Engine:
    return start_engine(Settings(pages=PAGES))


@pytest.fixture(scope="module")
def small_stock(start_engine: Callable[[Settings], Engine]) -> Engine:
    return start_engine(Settings(rkv=False, pages=PAGES))


def test_preempted_requests_replay_their_compactions(
    rkv: Engine, small_rkv: Engine, encode: texts.Encode
) -> None:
    """Requests that lose all pages after several compactions end as in a run without preemption."""
    growing = [Ask(encode(texts.multiples(n)), 130, {"rkv_budget": 0}) for n in (3, 4, 6, 9)]
    # Last come, first preempted.
    policies = ("random", "recency", "keydiff", "snapkv", "rkv")
    compacted = [
        Ask(
            encode(texts.squares(5, first=10 * n)),
            120,
            {"rkv_budget": 64 + 8 * n, "rkv_buffer": 12, "rkv_policy": policy},
        )
        for n, policy in enumerate(policies)
    ]
    asks = growing + compacted

    in_big_pool, in_small_pool = rkv.submit(asks), small_rkv.submit(asks)
    undisturbed, disturbed = in_big_pool.result(), in_small_pool.result()

    assert undisturbed.preemptions() == 0
    preempted = {index for step in disturbed.steps for index in step.preempted}
    assert len(preempted) >= 3
    for index in preempted:
        first = next(n for n, step in enumerate(disturbed.steps) if index in step.preempted)
        before = sum(index in step.compacted for step in disturbed.steps[:first])
        if index >= len(growing):
            assert before >= 2
            assert disturbed.compactions(index) > undisturbed.compactions(index)
    assert_alike(disturbed.answers, undisturbed.answers)
    for answer, expected in zip(disturbed.answers, undisturbed.answers, strict=True):
        assert answer.result["compactions"] == expected.result["compactions"]
        assert answer.result["evicted_tokens"] == expected.result["evicted_tokens"]


def test_fewer_preemptions_than_stock(small_rkv: Engine, small_stock: Engine, encode: texts.Encode) -> None:
    """A load that makes stock vLLM preempt needs no preemption, and few pages, when it is compacted."""
    prompts = [encode(texts.multiples(n)) for n in range(2, 10)]
    extra = {"rkv_budget": 64, "rkv_buffer": 32}

    with_stock = small_stock.submit([Ask(prompt, 120) for prompt in prompts])
    with_rkv = small_rkv.submit([Ask(prompt, 120, extra) for prompt in prompts])

    assert with_stock.result().preemptions() >= 2
    assert with_rkv.result().preemptions() == 0
    assert with_rkv.result().most_pages() <= len(prompts) * 3 < PAGES - 1
    assert [len(answer.tokens) for answer in with_rkv.result().answers] == [120] * len(prompts)


def test_max_model_len_beyond_the_pool(
    rkv: Engine, start_engine: Callable[[Settings], Engine], encode: texts.Encode
) -> None:
    """A pool of 160 tokens serves longer answers with a budget, and refuses alone what could never fit."""
    tiny = start_engine(Settings(pages=6, beyond_pool=(64, 32)))
    prompt = encode(texts.squares(5))
    bounded = {"rkv_budget": 64, "rkv_buffer": 32}
    # The first three would wait for ever, and the others behind them.
    asks = [
        Ask(prompt, 200, {"rkv_budget": 0}),
        Ask(prompt, 200, {"rkv_budget": 160}),
        Ask(encode(texts.squares(40)), 8),
        Ask(prompt, 200),
        Ask(prompt, 40, {"rkv_budget": 0}),
    ]

    in_tiny_pool = tiny.submit(asks)
    expected = rkv.run([Ask(prompt, 200, bounded), asks[4]])

    refused, served = in_tiny_pool.result().answers[:3], in_tiny_pool.result().answers[3:]
    for answer in refused:
        assert answer.finish_reason == "error" and answer.tokens == []
        assert "pages" in answer.result["reason"] and answer.result["peak_pages"] == 0
    assert [answer.tokens for answer in served] == [answer.tokens for answer in expected.answers]
    assert served[0].result["pages_without_compaction"] > 5 >= served[0].result["peak_pages"]
    assert served[0].result["compactions"] >= 3
