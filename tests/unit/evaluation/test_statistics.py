"""Intervals: against known values, at the ends, and by how often they hold what they should."""

from __future__ import annotations

import random

import pytest

from rkv_vllm.evaluation.statistics import effective_count, mean, share, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (8, 10, 0.490162, 0.943318),
        (93, 192, 0.414688, 0.554675),
        (512, 512, 0.992553, 1.0),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    """Proves that the interval is Wilson's, and never passes 0 or 1."""
    found = wilson(right / count, count)
    assert found == pytest.approx((low, high), abs=1e-6)
    assert 0 <= found[0] <= right / count <= found[1] <= 1


def test_one_answer_a_problem_counts_each() -> None:
    """Proves that without several samples nothing but Wilson's interval is left."""
    outcomes = [[True]] * 8 + [[False]] * 2
    assert share(outcomes) == (0.8, *wilson(0.8, 10))


def test_answers_that_always_agree_count_as_one() -> None:
    """Proves that copies of an answer do not narrow the interval."""
    outcomes = [[True] * 8] * 6 + [[False] * 8] * 4
    assert effective_count(outcomes) == 10
    assert share(outcomes) == share([each[:1] for each in outcomes])


def test_answers_that_do_not_depend_on_the_problem_count_each() -> None:
    """Proves that where problems do not differ, all answers count."""
    assert effective_count([[True, False, True, False]] * 10) == 40


def test_all_right_is_not_certain() -> None:
    """Proves that samples of problems that are all right do not count as so many problems."""
    assert share([[True] * 8] * 10) == (1.0, *wilson(1.0, 10))


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9])
def test_intervals_hold_the_truth(agreement: float) -> None:
    """Proves that 93 of 100 intervals hold the true share, however much answers to a problem agree."""
    rng = random.Random(3)
    held = 0
    for _ in range(600):
        outcomes = []
        for _ in range(40):
            common = rng.random() < 0.7
            outcomes.append([common if rng.random() < agreement else rng.random() < 0.7 for _ in range(4)])
        _, low, high = share(outcomes)
        held += low <= 0.7 <= high
    assert held / 600 >= 0.93


def test_mean_of_clusters() -> None:
    """Proves mean and interval on numbers worked out by hand: means 1 and 3, standard error 1."""
    value, low, high = mean([[0.0, 2.0], [3.0, 3.0]])
    assert value == 2.0
    assert (low, high) == pytest.approx((2 - 1.959964, 2 + 1.959964))


def test_problems_without_all_samples_weigh_by_their_answers() -> None:
    """Proves that an unfinished run's mean is that of its answers."""
    assert share([[True, True, True], [False]]).value == 0.75


def test_one_problem_shows_no_spread() -> None:
    """Proves that a run on one problem has finite numbers."""
    assert mean([[3.0, 5.0]]) == (4, 4, 4)
    assert share([[True, False]]).value == 0.5
