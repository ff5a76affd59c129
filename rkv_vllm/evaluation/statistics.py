"""Shares and means with their 95 % intervals; no vLLM, no files.

Several answers to one problem are not independent: an easy problem is right in all of them. Each function
takes the values problem by problem, and its interval widens by as much as the answers to a problem agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: Of the standard normal distribution, for 95 %.
Z = 1.959963984540054
INTERVAL = "95 %, Wilson score; several answers to a problem counted as one cluster (design effect)"


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a share seen in `count` independent trials; `count` may be fractional.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    centre, scale = share + Z * Z / (2 * count), 1 + Z * Z / count
    # At the ends the bound is exact, and rounding must not push it past the share itself.
    low = 0.0 if share == 0 else (centre - spread) / scale
    high = 1.0 if share == 1 else (centre + spread) / scale
    return low, high


def share(outcomes: Sequence[Sequence[bool]]) -> Estimate:
    """Share of true outcomes, with Wilson's interval for the effective number of answers.

    Args:
        outcomes: by problem, one for each of its answers; at least one.
    """
    value = _mean(outcomes)
    low, high = wilson(value, effective_count(outcomes))
    return Estimate(value, low, high)


def mean(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean with a normal interval from the variance between problems; one problem alone shows none.

    Args:
        values: by problem, one for each of its answers; at least one.
    """
    value = _mean(values)
    error = Z * math.sqrt(_variance_of_mean(values)) if len(values) > 1 else 0.0
    return Estimate(value, value - error, value + error)


def effective_count(outcomes: Sequence[Sequence[bool]]) -> float:
    """Number of independent trials that would tell as much: at least the problems, at most the answers.

    It is share * (1 - share) / variance, where the variance of the share is that between problems (Kish,
    Survey Sampling, 1965: the design effect). Where all outcomes are the same nothing tells how much answers
    to a problem differ, and each problem counts once.
    """
    problems, answers = len(outcomes), sum(map(len, outcomes))
    value = _mean(outcomes)
    if problems == answers or value in (0, 1) or problems == 1:
        return problems
    variance = _variance_of_mean(outcomes)
    count = value * (1 - value) / variance if variance > 0 else answers
    return min(max(count, problems), answers)


def _mean(values: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, values)) / sum(map(len, values))


def _variance_of_mean(values: Sequence[Sequence[float]]) -> float:
    """Variance of the mean over all values; problems are drawn independently, and may have different numbers
    of them."""
    value, problems, answers = _mean(values), len(values), sum(map(len, values))
    squares = sum((sum(each) - value * len(each)) ** 2 for each in values)
    return problems / (problems - 1) * squares / answers**2
