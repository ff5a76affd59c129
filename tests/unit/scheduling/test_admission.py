"""Who is admitted, beside stock vLLM: by whole engines without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.modelless_runs import Rkv, budget, make_engine, run_steps, run_to_end, steps_to_answer
from vllm.v1.request import RequestStatus

FULL_CACHE = {"rkv_budget": 0}


def giant_and_short(rkv: Rkv, extra_args: dict[str, Any]) -> int:
    engine = make_engine(rkv, pages=1000, max_num_seqs=64)
    engine.add("giant", [3] * 20, 12_000, extra_args=budget(15_000))
    run_steps(engine, 20)
    engine.add("short", [9] * 4200, 10, extra_args=extra_args)
    return steps_to_answer(engine, "short", most=60)


def twenty_and_short(rkv: Rkv, extra_args: dict[str, Any]) -> int:
    engine = make_engine(rkv, pages=20 * 264 + 2, max_num_seqs=64)
    for index in range(20):
        engine.add(f"large-{index}", [3 + index] * 20, 12_000, extra_args=budget(4096))
    run_steps(engine, 20)
    engine.add("short", [99] * 100, 10, extra_args=extra_args)
    return steps_to_answer(engine, "short", most=60)


@pytest.mark.parametrize(
    "extra_args", [FULL_CACHE, budget(6000), budget(64, 16)], ids=["full", "large", "small"]
)
@pytest.mark.parametrize("steps", [giant_and_short, twenty_and_short])
def test_large_budgets_hold_nobody_up_who_is_soon_gone(
    steps: Callable[[Rkv, dict[str, Any]], int], extra_args: dict[str, Any]
) -> None:
    """Proves that a short answer comes as soon as with stock vLLM while others have yet to fill a budget."""
    assert steps({}, extra_args) <= 1.1 * steps(None, extra_args)


def test_full_caches_are_admitted_as_in_stock_vllm() -> None:
    """Proves that a request without a budget is admitted by what it holds, however long it may become."""

    def steps(rkv: Rkv) -> int:
        engine = make_engine(rkv, pages=20 * 264 + 2)
        for index in range(20):
            engine.add(f"large-{index}", [3 + index] * 20, 4000, extra_args=budget(4096))
        run_steps(engine, 20)
        engine.add("full", [99] * 100, 300, extra_args=FULL_CACHE)
        return steps_to_answer(engine, "full", most=600)

    assert steps({}) == steps(None)


@pytest.mark.parametrize(
    ("extra_args", "max_tokens"), [(budget(1024), 2000), (FULL_CACHE, 50)], ids=["budget", "full"]
)
def test_urgent_requests_start_before_others_have_grown(extra_args: dict[str, Any], max_tokens: int) -> None:
    """Proves that under `priority` no room is kept for those that vLLM would preempt for the newcomer."""

    def steps(rkv: Rkv) -> int:
        engine = make_engine(rkv, pages=40 * 72, policy="priority")
        for index in range(40):
            engine.add(f"patient-{index}", [3 + index] * 20, 3000, extra_args=budget(1024), priority=9)
        run_steps(engine, 50)
        engine.add("urgent", [99] * 20, max_tokens, extra_args=extra_args, priority=0)
        return steps_to_answer(engine, "urgent", most=2500)

    assert steps({}) <= 1.1 * steps(None)


def test_patient_requests_leave_room_for_urgent_ones() -> None:
    """Proves that under `priority` a newcomer waits for the growth of those that are more urgent or equal."""
    engine = make_engine({}, pages=40 * 72, policy="priority")
    for index in range(60):
        engine.add(f"{index}", [3 + index] * 20, 1500, extra_args=budget(1024), priority=index % 3)
    _, preemptions = run_to_end(engine)
    assert preemptions == 0


def test_a_sessions_next_turn_does_not_wait_for_pages_that_left() -> None:
    """Proves that a streaming-input session goes on at once beside requests with many rounds behind them."""

    def steps(rkv: Rkv) -> int:
        engine = make_engine(rkv, pages=600, max_num_seqs=64, max_model_len=8192)
        engine.add("session", [5] * 40, 3, resumable=True)
        for index in range(16):
            engine.add(f"long-{index}", [6 + index] * 40, 6000, extra_args=budget(64, 16))
        run_steps(engine, 600)
        engine.add("session", [7] * 40, 3, resumable=True)
        for step in range(60):
            if engine.schedule().num_scheduled_tokens.get("session"):
                return step
            engine.update()
        return 60

    assert steps({}) == steps(None)


@pytest.mark.parametrize("max_tokens", [100_000, 2**31, 2**62])
def test_max_tokens_beyond_the_model_is_cut(max_tokens: int) -> None:
    """Proves that requests run side by side which cannot become as long as they ask for."""

    def steps(rkv: Rkv) -> int:
        engine = make_engine(rkv, pages=1000, max_model_len=512)
        for index in range(20):
            engine.add(f"{index}", [3 + index] * 20, max_tokens, extra_args=budget(20_000))
        return run_to_end(engine, most=12_000)[0]

    assert steps({}) <= 1.1 * steps(None)


@pytest.mark.parametrize("prompt_tokens", [100, 500, 1000])
@pytest.mark.parametrize("shared", [True, False])
def test_no_budget_is_preempted_for_anothers_growth(prompt_tokens: int, shared: bool) -> None:
    """Proves that a pool full of budgets preempts nobody, with one prompt for all or one for each."""

    def run(rkv: Rkv) -> tuple[int, int]:
        engine = make_engine(rkv, pages=10 * 40 + 62)  # for ten, and a shared prompt
        for index in range(30):
            start = 0 if shared else index
            prompt = [5 + (start + 7 * token) % 900 for token in range(prompt_tokens)]
            engine.add(f"{index}", prompt, 1500, extra_args=budget(512))
        return run_to_end(engine)

    steps, preemptions = run({})
    stock_steps, _ = run(None)
    assert preemptions == 0
    assert steps <= 1.1 * stock_steps, f"{steps} steps, {stock_steps} with stock vLLM"


@pytest.mark.parametrize("stop", ["zzz", None])
def test_a_client_that_leaves_teaches_nothing(stop: str | None) -> None:
    """Proves that aborts, with stop strings or without, leave what is known of lengths as it was."""
    engine = make_engine({}, pages=540)
    for index in range(200):
        engine.add(f"{index}", [3 + index] * 20, 900, extra_args=budget(120, 24), stop=stop)
    while engine.scheduler.has_requests():
        run_steps(engine, 6)
        started = [each.request_id for each in engine.scheduler.running if each.num_output_tokens > 3]
        engine.scheduler.finish_requests(started, RequestStatus.FINISHED_ABORTED)
    assert engine.scheduler._admission.early_stop_rate.per_token(running_tokens=0) == 0.0
    assert not engine.scheduler._with_stop_strings


def test_closed_sessions_leave_nothing_behind() -> None:
    """Proves that a session with stop strings which is closed while it waits for input is forgotten."""
    engine = make_engine({})
    for index in range(20):
        engine.add(f"{index}", [3 + index] * 20, 3, stop="zzz", resumable=True)
    run_steps(engine, 12)
    assert len(engine.scheduler.requests) == 20
    for index in range(20):
        engine.add(f"{index}", [], 3, stop="zzz", resumable=False)
    assert not engine.scheduler.requests and not engine.scheduler._with_stop_strings


def test_who_is_passed_over_keeps_its_place() -> None:
    """Proves that room is kept for nobody whom vLLM asked for and did not admit, and that others switch for
    the first of those alone."""
    asked = {"rkv_budget": "auto", "rkv_min_budget": 64, "rkv_buffer": 32}
    engine = make_engine({}, pages=600, max_num_seqs=4)
    for index in range(4):
        engine.add(f"{index}", [3 + index] * 20, 900, extra_args=budget(120, 24))
    run_steps(engine, 20)
    for name, extra_args in (("first", asked), ("second", budget(120, 24)), ("third", asked)):
        engine.add(name, [9] * 40, 900, extra_args=extra_args)
    admission, requests = engine.scheduler._admission, engine.scheduler.requests
    admission.running_requests_changed()
    admission.begin_step(engine.scheduler.running)
    for name in ("first", "second", "third"):
        admission.set_watermark(requests[name], 0)
    [outlook] = admission._outlooks.values()
    assert sorted(each.request_id for each in outlook.requests) == ["0", "1", "2", "3"]
    assert admission.autos._waiting is not None and admission.autos._waiting[0] is requests["first"]


PROMPT_ALONE = "the prompt alone fills 125; send a shorter one, or have the server given a larger pool"


@pytest.mark.parametrize(
    ("prompt", "extra_args", "resumable", "advice"),
    [
        (2000, FULL_CACHE, False, PROMPT_ALONE),
        (2000, budget(64), False, PROMPT_ALONE),
        (100, FULL_CACHE, False, "ask for fewer tokens (max_tokens) or for a KV budget"),
        (100, budget(900), False, "ask for fewer tokens (max_tokens) or for a smaller KV budget"),
        (
            *(100, budget(64), True),
            "a streaming-input session is reckoned with max_model_len; it needs a larger pool",
        ),
    ],
)
def test_a_refusal_says_what_would_help(
    prompt: int, extra_args: dict[str, Any], resumable: bool, advice: str
) -> None:
    """Proves that no advice is given that cannot help: a budget does nothing for a prompt beyond the pool."""
    engine = make_engine({"beyond_pool": True, "budget": 64}, pages=40)
    engine.add("large", [3] * prompt, 2000, extra_args=extra_args, resumable=resumable)
    run_steps(engine, 1)
    engine.schedule()
    [refused] = engine.update()
    assert refused.kv_transfer_params is not None
    assert refused.kv_transfer_params["rkv_refusal"].partition(" has 40: ")[2] == advice
