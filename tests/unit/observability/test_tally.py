"""The scheduler's tally: what one story of requests adds up to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rkv_vllm.decisions.messages import CompactionResult, TokenCompaction
from rkv_vllm.observability.metric_table import TALLIED, budget_class
from rkv_vllm.observability.tally import MetricTally, read
from rkv_vllm.settings.config import AutoBudget, CompactionSettings

PAGE = 32
BUDGET = CompactionSettings(budget=64, buffer=32, policy="rkv")


def compaction(request_id: str, *, sources: tuple[int, ...], targets: tuple[int, ...]) -> TokenCompaction:
    """96 slots down to 64."""
    return TokenCompaction(
        request_id=request_id,
        source_pages=(sources,),
        target_pages=(targets,),
        length=96,
        keep=64,
        evicted=32,
        policy="rkv",
        query_row=0,
    )


def result(compactions: int = 0, evicted_tokens: int = 0) -> CompactionResult:
    return CompactionResult(
        budget=64,
        buffer=32,
        policy="rkv",
        compactions=compactions,
        evicted_tokens=evicted_tokens,
        peak_pages=3,
        pages_without_compaction=3,
        page_size=PAGE,
        reason=None,
    )


def totals(tally: MetricTally) -> dict[str, float]:
    """Metrics of a tally by name and labels, histograms as the sum of what they observed."""
    found: dict[str, float] = {}
    for reading in read(tally.take()):
        name = "/".join((reading.metric.name, *reading.labels))
        found[name] = found.get(name, 0) + reading.value * reading.times
    return found


@pytest.fixture
def tally() -> MetricTally:
    return MetricTally(PAGE, pool_pages=90)


def test_a_compaction_is_counted_in_tokens_and_pages(tally: MetricTally) -> None:
    """Three pages become two, one of which had to be copied out of a shared page."""
    tally.executed(compaction("a", sources=(1, 2, 3), targets=(1, 3)))
    found = totals(tally)
    assert found["rkv_compactions_total/rkv/executed"] == 1
    assert found["rkv_evicted_tokens_total/rkv"] == 32
    assert found["rkv_freed_pages_total/rkv"] == 1
    assert found["rkv_copied_pages_total/rkv"] == 1


def test_a_cancelled_compaction_evicts_nothing(tally: MetricTally) -> None:
    """It shows as cancelled, and nowhere else."""
    tally.cancelled(compaction("a", sources=(1, 2, 3), targets=(1, 2)))
    found = totals(tally)
    assert found.pop("rkv_pool_pages") == 90
    assert found == {"rkv_compactions_total/rkv/cancelled": 1}


def test_pages_return_to_what_is_held_when_requests_leave(tally: MetricTally) -> None:
    """What compaction saves is gone when its request is, whether it was preempted or ended."""
    tally.arrived(BUDGET)
    for leave in ("preempt", "end"):
        tally.executed(compaction("a", sources=(1, 2, 3), targets=(1, 2)))
        tally.step_ends(1.0, is_idle=False, pages_held=10, reserved_pages=0)
        found = totals(tally)
        assert found["rkv_pages_without_compaction"] == 11
        assert found["rkv_compacted_requests"] == 1
        if leave == "preempt":
            tally.preempted("a", 96)
        else:
            tally.ended("a", BUDGET, result(1, 32), 96)
        tally.step_ends(2.0, is_idle=True, pages_held=0, reserved_pages=0)
        found = totals(tally)
        assert found["rkv_pages_held"] == found["rkv_pages_without_compaction"] == 0
        assert found["rkv_compacted_requests"] == 0
    assert found["rkv_unfinished_requests/le_256"] == 0


def test_only_tokens_computed_before_are_replayed(tally: MetricTally) -> None:
    """A request is preempted at 100 tokens: a hit on the first 32 and tokens from the 100th on do not count,
    and a second preemption half way counts again what is computed again."""
    tally.preempted("a", 100)
    tally.computed("a", 32, 80)
    tally.preempted("a", 80)
    tally.computed("a", 0, 64)
    tally.computed("a", 64, 120)
    assert totals(tally)["rkv_replayed_tokens_total"] == 48 + 100
    assert not tally.replaying


def test_an_ended_request_says_what_it_kept(tally: MetricTally) -> None:
    """A quarter of its tokens; its class is counted, and it leaves none behind."""
    tally.arrived(BUDGET)
    tally.ended("a", BUDGET, result(9, 288), 384)
    found = totals(tally)
    assert found["rkv_request_kept_tokens"] == 96
    assert found["rkv_request_kept_ratio"] == pytest.approx(0.25)
    assert found["rkv_requests_total/le_256"] == 1
    assert not any(name.startswith("rkv_uncompacted") for name in found)


@pytest.mark.parametrize(
    ("budget", "reason"), [(None, "full cache"), (BUDGET, "shorter than budget + buffer")]
)
def test_uncompacted_requests_say_why(
    tally: MetricTally, budget: CompactionSettings | None, reason: str
) -> None:
    """No budget, or not long enough for it."""
    tally.arrived(budget)
    tally.ended("a", budget, result(), 40)
    assert totals(tally)[f"rkv_uncompacted_requests_total/{reason}"] == 1


def test_auto_is_counted_before_and_after_its_switch(tally: MetricTally) -> None:
    """One request switches for the next in the queue and ends, another ends with its full cache."""
    auto = replace(BUDGET, auto=AutoBudget())
    tally.arrived(auto)
    tally.arrived(auto)
    tally.switched("waiting")
    tally.executed(compaction("a", sources=(1, 2, 3), targets=(1, 2)))
    tally.step_ends(1.0, is_idle=False, pages_held=10, reserved_pages=7)
    found = totals(tally)
    assert found["rkv_auto_requests/full"] == found["rkv_auto_requests/switched"] == 1
    assert found["rkv_auto_switches_total/waiting"] == 1
    assert (found["rkv_reserved_pages"], found["rkv_unfinished_requests/auto"]) == (7, 2)
    tally.ended("a", auto, {**result(1, 32), "full_cache_tokens": 96}, 120)
    tally.ended("b", auto, result(), 80)
    found = totals(tally)
    assert found["rkv_request_full_cache_tokens"] == 96
    assert found["rkv_uncompacted_requests_total/memory was never short"] == 1
    assert found["rkv_auto_requests/full"] == found["rkv_auto_requests/switched"] == 0
    assert found["rkv_requests_total/auto"] == 2


def test_idle_time_is_no_step_time(tally: MetricTally) -> None:
    """Two seconds of steps, and an hour without requests between them."""
    tally.step_begins(10.0)
    tally.step_ends(11.0, is_idle=True, pages_held=0, reserved_pages=0)
    tally.step_begins(3611.0)
    tally.step_begins(3611.5)
    tally.step_ends(3612.0, is_idle=True, pages_held=0, reserved_pages=0)
    assert totals(tally)["rkv_step_seconds_total"] == pytest.approx(2.0)


def test_durations_are_observed_one_by_one(tally: MetricTally) -> None:
    """Equal ones too."""
    tally.record_durations([1500, 1500, 20])
    [again] = [reading for reading in read(tally.take()) if reading.value == pytest.approx(0.0015)]
    assert again.times == 2


def test_a_step_without_news_sends_nothing(tally: MetricTally) -> None:
    """Gauges are sent when they change, tally when they grow."""
    tally.step_ends(1.0, is_idle=True, pages_held=3, reserved_pages=0)
    assert tally.take()
    tally.step_ends(2.0, is_idle=True, pages_held=3, reserved_pages=0)
    assert tally.take() == {}


@pytest.mark.parametrize(("tokens", "expected"), [(9, "le_256"), (257, "le_512"), (5000, "gt_4096")])
def test_budget_classes(tokens: int, expected: str) -> None:
    """The bound belongs to its class."""
    assert budget_class(CompactionSettings(budget=tokens, buffer=32, policy="rkv")) == expected


def test_names_follow_prometheus() -> None:
    """Prefix `rkv_`, `_total` on tally alone, labels from closed sets."""
    for metric in TALLIED:
        assert metric.name.startswith("rkv_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert all(metric.labels.values())
