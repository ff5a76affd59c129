"""What a request gets does not depend on whom it shares pages, a batch or a process with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import texts
from engine_process import Answer, Ask, Engine, Run, Settings
from support.identical import assert_alike

EXTRAS: tuple[dict[str, Any], ...] = (
    {"rkv_budget": 48, "rkv_buffer": 16, "rkv_policy": "rkv"},
    {"rkv_budget": 64, "rkv_buffer": 24, "rkv_policy": "snapkv"},
    {"rkv_budget": 56, "rkv_buffer": 16, "rkv_policy": "keydiff"},
    {"rkv_budget": 0},
    {"rkv_budget": 72, "rkv_buffer": 8, "rkv_policy": "recency"},
    {"rkv_budget": 60, "rkv_buffer": 20, "rkv_policy": "random"},
    {"rkv_budget": 96, "rkv_buffer": 40},
    {},
)


@pytest.fixture(scope="module")
def forty(encode: texts.Encode) -> list[Ask]:
    return [Ask(encode(texts.multiples(n + 2)), 75, EXTRAS[n % len(EXTRAS)]) for n in range(40)]


@pytest.fixture(scope="module")
def in_eight(rkv: Engine, forty: list[Ask]) -> Run:
    return rkv.run(forty[:8])


def assert_same_output(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Rounding may differ, and nothing else."""
    assert_alike(found, expected)
    assert [answer.result for answer in found] == [answer.result for answer in expected]


def test_alone_as_in_eight(rkv: Engine, forty: list[Ask], in_eight: Run) -> None:
    """Two requests with different policies give the same output each by itself as beside seven others."""
    for index in range(2):
        alone = rkv.run([forty[index]])

        assert_same_output(alone.answers, [in_eight.answers[index]])
        assert alone.compactions(0) >= 2


def test_in_forty_as_in_eight(rkv: Engine, forty: list[Ask], in_eight: Run) -> None:
    """Eight requests with different settings give the same output beside 32 more."""
    assert_same_output(in_eight.answers, rkv.run(forty).answers[:8])


def test_multiprocess_engine_as_in_process(
    start_engine: Callable[[Settings], Engine], forty: list[Ask], in_eight: Run
) -> None:
    """An engine core in a process of its own gives the same output, and all pages back."""
    engine = start_engine(Settings(multiprocess=True))

    assert_same_output(in_eight.answers, engine.run(forty[:8]).answers)


def test_shared_prefix_survives_compaction(rkv: Engine, stock: Engine, encode: texts.Encode) -> None:
    """A shared prefix keeps its content when two of four sharers compact, and a later request hits it."""
    prefix = encode(texts.squares(20))[:256]
    tails = [encode(f" Now {number}:")[:4] for number in ("one", "two", "three", "four", "five")]
    prompts = [prefix + tail for tail in tails]
    compacted = [
        {"rkv_budget": 64, "rkv_buffer": 16, "rkv_policy": "rkv"},
        {"rkv_budget": 80, "rkv_buffer": 12, "rkv_policy": "keydiff"},
    ]
    full_alone = [stock.submit([Ask(prompts[index], 24)]) for index in (0, 3, 4)]
    compacted_alone = [rkv.run([Ask(prompts[index], 40, compacted[index - 1])]) for index in (1, 2)]
    rkv.run([Ask(prompts[0], 2)])
    sharing = [
        Ask(prompts[0], 24),
        Ask(prompts[1], 40, compacted[0]),
        Ask(prompts[2], 40, compacted[1]),
        Ask(prompts[3], 24, {"rkv_budget": 0}),
    ]
    shared = rkv.run(sharing, keep_prefix_cache=True)
    later = rkv.run([Ask(prompts[4], 24)], keep_prefix_cache=True)

    # The queries of `rkv` are computed anew, and with them the prefix's last page; `keydiff` looks at none.
    assert [answer.cached_tokens for answer in shared.answers] == [256, 224, 256, 256]
    assert later.answers[0].cached_tokens == 256
    for index in (1, 2):
        # While the other sharers still decode.
        assert min(n for n, step in enumerate(shared.steps) if index in step.compacted) <= 2
        assert shared.compactions(index) >= 3
    assert_alike([shared.answers[0]], full_alone[0].result().answers)
    assert_alike([shared.answers[3]], full_alone[1].result().answers)
    assert_alike(later.answers, full_alone[2].result().answers)
    assert_alike([shared.answers[1]], compacted_alone[0].answers)
    assert_alike([shared.answers[2]], compacted_alone[1].answers)
