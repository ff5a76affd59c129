"""Query rows among many requests with a buffer so small that each needs one in every step."""

from __future__ import annotations

from typing import Any

from support.modelless_runs import Rkv, budget, make_engine, run_steps, steps_to_answer

from rkv_vllm.bench.modelless import ModellessEngine
from rkv_vllm.decisions.query_rows import MAX_ROWS

SMALL_BUFFER = budget(64, 8, "rkv")


def prompt(start: int, length: int) -> list[int]:
    return list(range(start, start + length))


def add_hogs(engine: ModellessEngine) -> None:
    """As many as there are rows."""
    for index in range(MAX_ROWS):
        engine.add(f"hog-{index}", prompt(3, 20 + index % 8), 4000, extra_args=SMALL_BUFFER)


def test_small_buffers_leave_query_rows_to_others() -> None:
    """Proves that a request beside others that always need a row takes no more than a tenth longer."""

    def steps(rkv: Rkv) -> int:
        engine = make_engine(rkv)
        add_hogs(engine)
        engine.add("victim", prompt(3, 20), 300, extra_args=budget(64, 128, "rkv"))
        return steps_to_answer(engine, "victim", most=600)

    assert steps({}) <= 1.1 * steps(None)


def test_who_needs_no_query_row_waits_for_none() -> None:
    """Proves that a request whose cached prefix ends at its window does not hold up those behind it."""
    length = 16 * 64 + 8
    shared = [5 + index % 90 for index in range(length)]

    def steps(rkv: Rkv, extra_args: dict[str, Any]) -> int:
        engine = make_engine(rkv)
        engine.add("warm", shared, 2, extra_args={"rkv_budget": 0})
        assert steps_to_answer(engine, "warm", most=10) < 10
        add_hogs(engine)
        run_steps(engine, 100)
        engine.add("without a row", shared, 5, extra_args=extra_args)
        engine.add("behind it", [9] * 30, 10, extra_args={"rkv_budget": 0})
        return steps_to_answer(engine, "behind it", most=60)

    assert steps({}, SMALL_BUFFER) == steps(None, SMALL_BUFFER)
