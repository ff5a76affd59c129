"""Loads that go on for whole lives of their requests: vLLM's real schedulers, no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import llama_8b
import pytest
from long_run import SimulatedStep, StepTime, main, simulate, stretches

from rkv_vllm.bench.load import requests_that_run, slots_on_average
from rkv_vllm.bench.roofline import HardwareLimits
from rkv_vllm.bench.rows import Kind, Row
from rkv_vllm.bench.window import Window

FACTS = llama_8b.FACTS.model_copy(update={"pool_pages": 200})
STEP_TIME = StepTime(FACTS, HardwareLimits(bytes_per_second=1e12, operations_per_second=1e14))
STOCK_ALONE = Path(__file__).parents[3] / "benchmarks/results/throughput-h100/5-stock-life.json"
ROW = Row(name="", input=16, output=480, budget=64, buffer=16, rkv_entry="compacted")


@pytest.mark.parametrize("kind", ["stock", "rkv"])
def test_no_more_run_in_the_long_run_than_the_pool_holds(kind: Kind) -> None:
    """Proves Little's law of both schedulers: over whole lives requests of all ages run, and fill the pool.

    Stock's preempts them on the way; ours does not.
    """
    steps = simulate(ROW, kind, STEP_TIME, 3 * ROW.output)
    assert max(step.slots for step in steps) <= FACTS.pool_pages * FACTS.page_size
    most = FACTS.pool_pages * FACTS.page_size / slots_on_average(ROW, ROW.budget_for(kind))
    running = fmean(step.running for step in steps)
    assert 0.8 * most < running < 1.02 * most
    assert (sum(step.preemptions for step in steps) > 0) == (kind == "stock")
    fit = requests_that_run(ROW, ROW.budget_for(kind), FACTS.pool_pages, FACTS.page_size, FACTS.max_num_seqs)
    first = fmean(step.running for step in steps[:32])
    assert (first > fit) == (kind == "stock")  # new ones are let into every free page


def test_a_step_takes_as_much_longer_as_the_windows_did() -> None:
    """Proves that what was measured over its floor, prompts aside, scales what is calculated."""
    slots, prompt_tokens = 20 * 8 * 16, 100
    measured = 1.5 * STEP_TIME.decode(20, slots) + STEP_TIME.prompts(prompt_tokens)
    numbers = {name: 0 for name, field in Window.model_fields.items() if field.is_required()}
    window = Window.model_validate(
        numbers
        | {
            "steps": 10,
            "step_milliseconds": measured,
            "running": 20,
            "pages_per_request": 8,
            "prompt_tokens": 600,
            "recomputed_tokens": 400,
        }
    )
    fitted = STEP_TIME.fitted([window])
    assert fitted.above_floor == pytest.approx(1.5)
    assert fitted(20, slots, prompt_tokens) == pytest.approx(measured, rel=0.01)


def test_stretches_are_of_calculated_seconds() -> None:
    """Proves that stretches are cut by the steps' own time, and that all steps count in the whole."""
    step = SimulatedStep(milliseconds=100, tokens=5, running=5, preemptions=1, prompt_tokens=0, slots=7)
    found = stretches([step] * 200)
    assert found["0 to 15 s"]["tokens_per_second"] == pytest.approx(50)
    assert found["0 to 15 s"]["preemptions"] + found["15 to 30 s"]["preemptions"] == 200
    assert found["all"]["seconds"] == pytest.approx(20)
    assert "30 to 60 s" not in found


@pytest.mark.parametrize(
    ("device", "row", "said"),
    [
        ({}, "16K", "row: none is called 16K, but 16K budget 1024"),
        ({}, "16K budget 1024", "row: 16K budget 1024 was not measured on rkv"),
        ({"limits": None}, "16K budget 1024", "device: only a GPU's floors are known"),
    ],
)
def test_results_that_do_not_serve_are_refused(
    device: dict[str, Any],
    row: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Proves that the command says what is wrong with a row or a file, and ends with status 2."""
    results = json.loads(STOCK_ALONE.read_text())
    results["device"] |= device
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["long_run.py", str(path), "--row", row, "--stock-outputs", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
