"""Requests that keep their full cache until memory is short: by whole engines without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from support.modelless_runs import budget, make_engine, run_steps, run_to_end, steps_to_answer
from vllm.v1.request import RequestStatus

from rkv_vllm.bench.modelless import ModellessEngine

MIN_BUDGET, BUFFER = 256, 32


def auto(policy: str = "rkv", min_budget: int = MIN_BUDGET, **more: int) -> dict[str, Any]:
    return {
        "rkv_budget": "auto",
        "rkv_min_budget": min_budget,
        "rkv_buffer": BUFFER,
        "rkv_policy": policy,
        **more,
    }


def ramp(
    engine: ModellessEngine, extra_args: Sequence[dict[str, Any]], levels: Sequence[int], steps: int = 400
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Keeps as many requests in the engine as each level says, in turn, and then lets all of them end.

    Returns: preemptions, and each request's result. Nothing of the pool is ever lost.
    """
    chance = random.Random(7)
    preemptions, count = 0, 0
    results: dict[str, dict[str, Any]] = {}

    def step() -> None:
        nonlocal preemptions
        preemptions += len(engine.schedule().preempted_req_ids or ())
        for output in engine.update():
            if output.finish_reason is not None:
                assert output.kv_transfer_params is not None
                results[output.request_id] = output.kv_transfer_params["rkv"]

    for level in levels:
        for number in range(steps):
            while len(engine.scheduler.requests) < level:
                prompt = [3 + count] * chance.randrange(20, 400)
                asked = extra_args[count % len(extra_args)]
                engine.add(str(count), prompt, chance.randrange(300, 900), extra_args=asked)
                count += 1
            step()
            if number % 25 == 0:
                engine.scheduler.check_integrity()
    while engine.scheduler.has_requests():
        step()
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not engine.scheduler._admission.autos
    return preemptions, results


@pytest.mark.parametrize(
    ("policy", "usage", "asynchronous"),
    [
        ("rkv", 0.9, True),
        ("rkv", 1.0, True),
        ("invariant", 1.0, True),
        ("recency", 1.0, False),
        ("rkv", 0.5, False),
    ],
)
def test_a_rising_load_preempts_nobody(policy: str, usage: float, asynchronous: bool) -> None:
    """Proves that as load rises above what full caches have room for, and falls, requests give their caches
    back in time; those of a low load, which has room, keep all."""
    engine = make_engine({"auto_usage": usage}, pages=400, asynchronous=asynchronous)
    preemptions, results = ramp(engine, [auto(policy)], levels=[2, 8, 20, 40, 8, 2])
    assert preemptions == 0
    switched = [result["compactions"] > 0 for result in results.values()]
    assert any(switched) and not all(switched)
    assert not switched[0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_quick_look_overlooks_nothing(asynchronous: bool) -> None:
    """Proves the bound, by which most steps end their search, no less than what requests really take."""
    engine = make_engine({}, pages=400, asynchronous=asynchronous)
    autos = engine.scheduler._admission.autos
    for number in range(600):
        if number % 12 == 0:
            asked = [auto(), auto("recency"), budget(64), {}][number // 12 % 4]
            engine.add(str(number), [3 + number] * (20 + 7 * number % 380), 300, extra_args=asked)
        engine.schedule()
        exact = sum(map(autos._counts.growth, engine.scheduler.running))
        assert exact <= autos._most_growth() <= exact + 4 * len(engine.scheduler.running) + 8
        engine.update()


def test_a_load_that_fixed_budgets_bear_is_borne() -> None:
    """Proves that auto serves as many requests at a time as a fixed budget of its minimum, nearly."""

    def running(extra_args: dict[str, Any]) -> int:
        engine = make_engine({}, pages=400)
        for index in range(60):
            engine.add(str(index), [3 + index] * 20, 3000, extra_args=extra_args)
        run_steps(engine, 1500)
        return len(engine.scheduler.running)

    assert running(auto()) >= 0.9 * running(budget(MIN_BUDGET, BUFFER))


def test_fixed_full_and_auto_share_a_pool() -> None:
    """Proves that neither fixed budgets nor auto are preempted beside one another."""
    engine = make_engine({}, pages=500)
    preemptions, results = ramp(engine, [auto(), budget(200, 40), auto("recency", 128)], levels=[5, 30, 5])
    assert preemptions == 0
    assert {result["budget"] for result in results.values()} == {"auto", 200}


def test_full_caches_push_auto_down() -> None:
    """Proves that memory which a request with its full cache grows into comes from those with auto."""
    engine = make_engine({}, pages=300)
    for index in range(6):
        engine.add(f"auto {index}", [3 + index] * 20, 2000, extra_args=auto())
    run_steps(engine, 500)
    engine.add("full", [99] * 500, 1500, extra_args={"rkv_budget": 0})
    steps, preemptions = run_to_end(engine)
    assert preemptions == 0 and steps < 2500


def test_a_newcomer_is_let_in() -> None:
    """Proves that a full pool gives way to a request that waits, within the notice of some switches."""
    engine = make_engine({"auto_usage": 1.0}, pages=300)
    for index in range(4):
        engine.add(f"long {index}", [3 + index] * 20, 4000, extra_args=auto())
    while engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > 12:
        run_steps(engine, 1)
    engine.add("newcomer", [99] * 1500, 10, extra_args=auto())
    assert steps_to_answer(engine, "newcomer", most=100) < 50


@pytest.mark.parametrize(("priority", "compacted"), [(0, True), (9, False)])
def test_nobody_is_cut_for_a_less_urgent_newcomer(priority: int, compacted: bool) -> None:
    """Proves that under `priority` a full pool gives way to a request as urgent as those that run, and that a
    less urgent one waits."""
    engine = make_engine({"auto_usage": 1.0}, pages=300, policy="priority")
    for index in range(4):
        engine.add(f"long {index}", [3 + index] * 20, 1120, extra_args=auto(), priority=1)
    while engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > 40:
        run_steps(engine, 1)
    engine.add("newcomer", [99] * 1500, 10, extra_args=auto(), priority=priority)
    run_steps(engine, 30)
    assert any(tracked.compactions for tracked in engine.scheduler._tracked.values()) is compacted


def test_auto_keeps_what_fits() -> None:
    """Proves that nobody loses a token below the usage that the operator allows."""
    for usage, compacted in ((1.0, False), (0.5, True)):
        engine = make_engine({"auto_usage": usage}, pages=200)
        for index in range(4):
            engine.add(str(index), [3 + index] * 20, 600, extra_args=auto())
        run_steps(engine, 500)
        rounds = [tracked.compactions for tracked in engine.scheduler._tracked.values()]
        assert any(rounds) is compacted


def test_siblings_share_their_prompt_and_are_not_cut_in_vain() -> None:
    """Proves that answers to one prompt, whose pages are the same, run beside one another without preemption,
    and that those who switch give pages back."""
    engine = make_engine({"auto_usage": 1.0}, pages=260)
    prompt = [5 + token % 900 for token in range(1600)]
    engine.add("first", prompt, 900, extra_args=auto())
    run_steps(engine, 3)
    for index in range(5):
        engine.add(f"sibling {index}", prompt, 900, extra_args=auto())
    steps, preemptions = run_to_end(engine)
    assert preemptions == 0 and steps < 2500


def test_no_row_no_order() -> None:
    """Proves that nobody is ordered to switch who would have to wait for a query row on the way."""
    engine = make_engine({"auto_usage": 0.2}, pages=200, max_num_seqs=4)
    for index in range(4):
        engine.add(str(index), [3 + index] * 20, 900, extra_args=auto())
    rows = engine.scheduler._query_rows
    for index in range(rows.num_rows):
        assert rows.hold(f"another {index}", gets_in_line=False)
    engine.scheduler._planner.captures = lambda output: {}  # type: ignore[method-assign]
    run_steps(engine, 500)
    assert all(tracked.lengths.next_due > 10_000 for tracked in engine.scheduler._tracked.values())
    for index in range(rows.num_rows):
        rows.release(f"another {index}")
    run_steps(engine, 1)
    assert len(rows.held()) > 0


@pytest.mark.parametrize("by_priority", [True, False])
def test_who_is_cut(by_priority: bool) -> None:
    """Proves that the longest request gives way first, and under `priority` a less urgent one before it."""
    engine = make_engine({}, pages=250, policy="priority" if by_priority else "fcfs")
    engine.add("long", [3] * 1600, 3000, extra_args=auto(), priority=0)
    engine.add("short", [4] * 800, 3000, extra_args=auto(), priority=9)
    tracked = engine.scheduler._tracked
    while not any(each.compactions for each in tracked.values()):
        run_steps(engine, 1)
    assert [name for name in tracked if tracked[name].compactions] == ["short" if by_priority else "long"]


def test_an_aborted_request_is_forgotten() -> None:
    """Proves that requests which end on the way to their switch leave nothing behind."""
    engine = make_engine({"auto_usage": 0.5}, pages=200)
    for index in range(4):
        engine.add(str(index), [3 + index] * 20, 900, extra_args=auto("invariant"))
    rows = engine.scheduler._query_rows
    while not rows.held():
        run_steps(engine, 1)
    engine.scheduler.finish_requests([str(index) for index in range(4)], RequestStatus.FINISHED_ABORTED)
    assert not rows.held() and not engine.scheduler._admission.autos
    engine.scheduler.check_integrity()
