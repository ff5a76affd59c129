"""Steps summed up in windows."""

from __future__ import annotations

import pytest

from rkv_vllm.bench.window import MOST_POINTS, Spread, Step, curve, is_steady, summarise


def test_a_window_s_figures() -> None:
    """Proves each figure of a window from steps that differ in everything."""
    steps = [
        Step(
            10.5,
            tokens=4,
            prompt_tokens=7,
            started=1,
            running=4,
            waiting=2,
            pool_use=0.5,
            preemptions=1,
            held_tokens=400,
            gaps=[0.5, 0.25, 0.75],
            first_tokens=[2.0],
        ),
        Step(
            11.0, tokens=2, finished=2, running=2, waiting=0, pool_use=0.25, compactions=3, evicted_tokens=48
        ),
        Step(
            12.0, tokens=6, running=6, waiting=1, pool_use=0.75, compaction_seconds=0.03, recomputed_tokens=9
        ),
    ]
    steps[1].held_tokens, steps[2].held_tokens, steps[2].gaps = 200, 600, [1.0] * 98
    window = summarise(10.0, steps, pool_pages=80, client_seconds=0.5)
    assert window.token_seconds == Spread(p50=1.0, p99=1.0)
    assert window.first_token_seconds == Spread(p50=2.0, p99=2.0)
    assert window.tokens_per_request == 100.0
    later = {"tokens_per_request", "token_seconds", "first_token_seconds"}
    assert window.model_dump(exclude=later) == pytest.approx(
        {
            "seconds": 2.0,
            "steps": 3,
            "output_tokens": 12,
            "tokens_per_second": 6.0,
            "step_milliseconds": 2000 / 3,
            "running": 4.0,
            "waiting": 1.0,
            "pool_use": 0.5,
            "most_pool_use": 0.75,
            "pages_per_request": 10.0,
            "prompt_tokens": 7,
            "started": 1,
            "finished": 2,
            "preemptions": 1,
            "recomputed_tokens": 9,
            "compactions": 3,
            "evicted_tokens": 48,
            "compaction_milliseconds_per_step": 10.0,
            "client_share": 0.25,
        }
    )


def test_a_spread_is_of_what_took_longest() -> None:
    """Proves that the 99th percentile is beyond all but one in a hundred, whatever their order."""
    assert Spread.of([9.0, *[1.0] * 51, *[2.0] * 49]) == Spread(p50=1.0, p99=2.0)
    assert Spread.of([5.0]) == Spread(p50=5.0, p99=5.0)
    assert Spread.of([]) is None


@pytest.mark.parametrize(
    ("running", "steady"),
    [
        ([], False),
        ([50] * 7, False),  # too few
        ([50] * 8, True),
        ([1, 2, 3, 4, *[50] * 8], True),  # what was before does not matter
        ([50, 50, 50, 50, 52, 52, 52, 52], True),
        ([50, 50, 50, 50, 53, 53, 53, 53], False),
        ([48, 52, 48, 52, 52, 48, 52, 48], True),  # about one mean
        ([1, 1, 1, 1, 2, 2, 2, 2], False),
        ([0] * 8, True),
    ],
)
def test_steady(running: list[int], steady: bool) -> None:
    """Proves that a load counts as steady when two stretches ran the same number, within the tolerance."""
    assert is_steady(running, 4) is steady


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 5000])
def test_a_curve_loses_no_token(count: int) -> None:
    """Proves that a curve of few points covers all steps and all their tokens."""
    steps = [Step(1.0 + index, tokens=3, running=5, pool_use=0.5) for index in range(count)]
    points = curve(0.0, steps)
    assert len(points) <= MOST_POINTS and bool(points) == bool(count)
    since, tokens = 0.0, 0.0
    for point in points:
        tokens += point.tokens_per_second * (point.seconds - since)
        since = point.seconds
    assert tokens == pytest.approx(3 * count) and since == count
