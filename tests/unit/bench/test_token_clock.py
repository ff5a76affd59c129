"""When tokens come, and how many are held."""

from __future__ import annotations

from rkv_vllm.bench.token_clock import TokenClock


def test_gaps_and_held_tokens_over_a_preemption() -> None:
    """Proves that a first token has no gap, that a preemption counts as one long gap, and that those alone
    hold tokens that run."""
    clock = TokenClock()
    assert clock.came("a", 100, 1, 1.0) is None
    assert clock.came("b", 50, 1, 1.0) is None
    assert clock.came("a", 100, 2, 1.5) == 0.5
    assert clock.held == 103 + 51
    clock.preempted("a")
    clock.preempted("a")
    assert clock.held == 51
    assert clock.came("a", 100, 1, 4.0) == 2.5
    assert clock.held == 104 + 51
    clock.ended("b")
    clock.ended("never seen")
    assert clock.held == 104
    clock.ended("a")
    assert clock.held == 0 and clock.came("a", 10, 1, 9.0) is None
