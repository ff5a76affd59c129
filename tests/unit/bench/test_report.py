"""Tables, plots and JSON out of stored results."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from llama_8b import FACTS
from typer.testing import CliRunner

from rkv_vllm.bench.kernel_time import kernel_time
from rkv_vllm.bench.plots import of_ramp, plot
from rkv_vllm.bench.report import compare, remarks
from rkv_vllm.bench.results import (
    Device,
    EngineRun,
    LoadResult,
    Measure,
    Results,
    merge,
    read_results,
)
from rkv_vllm.bench.roofline import HardwareLimits
from rkv_vllm.bench.rows import Entry, Group, Kind, Row
from rkv_vllm.bench.window import Step, curve, summarise
from rkv_vllm.cli import app

PAGES, PAGE_SIZE = FACTS.pool_pages, FACTS.page_size


def load(name: str, entry: Entry | None, speeds: list[float], *, running: int, **more: Any) -> LoadResult:
    """Windows of ten steps of a tenth of a second, with these tokens a second."""
    windows, steps = [], []
    for place, speed in enumerate(speeds):
        part = [
            Step(
                place + (index + 1) / 10,
                tokens=round(speed / 10),
                running=running,
                pool_use=0.5,
                compaction_seconds=0.005 if name == "a" and entry == "compacted" else 0.0,
            )
            for index in range(10)
        ]
        windows.append(summarise(place, part, PAGES, 0.01))
        steps += part
    return LoadResult(row=name, entry=entry, windows=windows, curve=curve(0.0, steps), steady=True, **more)


def engine_run(kind: Kind, loads: list[LoadResult]) -> EngineRun:
    return EngineRun(kind=kind, arguments=["--load-format", "dummy"], facts=FACTS, loads=loads)


@pytest.fixture
def results() -> Results:
    rows = (
        Row(name="a", input=128, output=1024, budget=256, rkv_entry="compacted", target=2.0),
        Row(name="b", input=128, output=1024, budget=512, rkv_entry="compacted", target=9.0),
        Row(name="c", input=700, output=64, budget=256, batch=4),
    )
    spent = kernel_time(
        [
            {"cat": "kernel", "name": "flash", "ts": 0, "dur": 5000},
            {"cat": "kernel", "name": "gemm", "ts": 6000, "dur": 1},
        ],
        steps=1,
    )
    stock = [
        load("a", "staggered", [100, 200, 300], running=4, kernel_time=spent),
        load("c", None, [50], running=4),
    ]
    rkv = [
        load("a", "compacted", [400, 700, 700], running=10),
        load("b", "compacted", [300, 300, 300], running=8),
        LoadResult(row="c", entry=None, failure="not one request fits into the pool"),
    ]
    return Results(
        command="rkv-vllm bench",
        started="2026-01-01T00:00:00+00:00",
        versions={"vllm": "0.32.0"},
        platform="Linux",
        device=Device(
            name="NVIDIA H200",
            memory_gib=139.8,
            limits=HardwareLimits(bytes_per_second=4.3e12, operations_per_second=790e12),
        ),
        group=Group(memory_gib=72, rows=rows),
        measure=Measure(),
        runs=[
            engine_run("stock", stock),
            engine_run("rkv", rkv),
            engine_run("stock", [load("a", "staggered", [250, 250, 250], running=4)]),
            EngineRun(
                kind="rkv", arguments=[], failure="the engine's process ended with status 1: out of memory"
            ),
        ],
    )


def test_medians_and_ratios(results: Results) -> None:
    """Proves that windows of all lives count, that ratios are of medians, and that rows which are one load to
    stock share its figures."""
    a, b, c = compare(results)
    assert a.sides["stock"].tokens_per_second == b.sides["stock"].tokens_per_second == 250
    assert (a.sides["stock"].windows, a.sides["rkv"].windows) == (6, 3)
    assert a.ratio == 700 / 250 and b.ratio == 300 / 250 and c.ratio is None
    assert (a.reached, b.reached, c.reached) == (True, False, None)
    assert a.sides["stock"].spread == pytest.approx(200 / 250)
    assert a.memory_ratio == pytest.approx(4 / 10)  # the same pages for more requests
    assert a.sides["stock"].kv_bytes_per_request == pytest.approx(500 / 4 * PAGE_SIZE * 131072)
    assert a.sides["rkv"].compaction_share == pytest.approx(0.05)
    assert a.over_stock == {"rkv": a.ratio}


def test_floors_stand_beside_what_was_measured(results: Results) -> None:
    """Proves that each side has the floor of its own pool, and a batch none."""
    a, _, c = compare(results)
    stock, rkv = a.sides["stock"], a.sides["rkv"]
    assert stock.roofline and rkv.roofline and stock.share_of_roofline
    assert (stock.roofline.running, rkv.roofline.running) == (24, 51)
    assert a.floor_ratio == pytest.approx(rkv.roofline.tokens_per_second / stock.roofline.tokens_per_second)
    assert stock.share_of_roofline == pytest.approx(250 / stock.roofline.tokens_per_second)
    assert c.sides["stock"].roofline is None


def test_what_failed_is_said_and_nothing_else_is_lost(results: Results) -> None:
    """Proves that a row that failed or was not run, and a life that failed, are named with their reasons."""
    a, b, c = compare(results)
    died = "the engine's process ended with status 1: out of memory"
    assert a.failures == [f"rkv: {died}"]
    assert b.failures == [f"rkv: {died}"]
    assert c.failures == ["rkv: not one request fits into the pool", f"rkv: {died}"]
    assert set(c.sides) == {"stock"}


def test_remarks(results: Results) -> None:
    """Proves that whatever makes a figure less than it seems is said beside it."""
    a, _, c = compare(results)
    assert remarks(a.row, a.sides["stock"]) == []
    assert remarks(c.row, c.sides["stock"]) == ["4 requests at once, from start to end, prompts included"]
    capped = a.row.model_copy(update={"max_age": 64, "warmup_tokens": 300})
    shaky = a.sides["stock"].model_copy(update={"steady": False, "client_share": 0.8})
    assert remarks(capped, shaky) == [
        "ages entered as prompts, at most 64 tokens of age each",
        "was not steady when measured",
        "the measuring process was busy 80% of the time",
    ]
    fresh = a.sides["rkv"].model_copy(update={"entry": "fresh"})
    assert remarks(capped, fresh) == ["first requests entered new, 300 tokens before measuring"]


def test_the_command_shows_stored_results(results: Results, tmp_path: Path) -> None:
    """Proves that a file of results gives tables, plots and JSON without an engine or a GPU."""
    file = tmp_path / "llama.json"
    file.write_text(results.model_dump_json())
    assert read_results(file) == results
    shown = CliRunner().invoke(app, ["bench", "--report", str(file), "--plots", str(tmp_path / "plots")])
    assert shown.exit_code == 0, shown.output
    assert "llama: r1-distill-llama-8b, NVIDIA H200, 72 GiB in all" in shown.stdout
    assert "2.80" in shown.stdout and "reached" in shown.stdout and "missed" in shown.stdout
    assert "c: rkv: not one request fits into the pool" in shown.stdout
    assert shown.stdout.count("flash") == 1  # of two rows that are one load to stock
    plots = {path.name: path.read_text() for path in (tmp_path / "plots").iterdir()}
    assert sorted(plots) == ["pool-llama.svg", "step.svg", "throughput.svg"]
    assert "output tokens/s" in plots["throughput.svg"] and "attention" in plots["step.svg"]
    as_json = CliRunner().invoke(app, ["bench", "--report", str(file), "--json"])
    assert [each["ratio"] for each in json.loads(as_json.stdout)] == [2.8, 1.2, None]


def test_a_ramp_is_drawn_in_its_order(results: Results, tmp_path: Path) -> None:
    """Proves that rows that go on from one another give a plot of its own, in which requests that came
    without a part of their text keep no share of it."""
    up = Row(name="up", concurrency=16, rkv_entry="compacted")
    down = up.model_copy(update={"name": "down", "concurrency": 8, "goes_on": True})
    runs = [
        engine_run("auto", [load("up", "staggered", [100], running=16), load("down", None, [50], running=8)]),
        engine_run("rkv", [load("up", "compacted", [200], running=16)]),
    ]
    ramp = results.model_copy(update={"group": Group(rows=(up, down)), "runs": runs})
    assert tmp_path / "ramp.svg" in plot([("ramp", ramp)], tmp_path)
    drawn = (tmp_path / "ramp.svg").read_text()
    assert drawn.index("R-KV once memory is short") > 0 and drawn.count(">16<") == drawn.count(">8<") == 3
    first, second = compare(ramp)
    whole, compacted = first.sides["auto"], first.sides["rkv"]
    kept = whole.model_copy(update={"kept_share": 0.5, "token_p99": 0.03})
    assert of_ramp(kept) == (100, 50, 30)
    assert isnan(of_ramp(compacted.model_copy(update={"kept_share": 0.5}))[1])
    assert "rkv" not in second.sides


def test_parts_of_a_run_are_taken_together(results: Results, tmp_path: Path) -> None:
    """Proves that files of the same engines give one table, with medians over all; others stay apart."""
    part = results.model_copy(
        update={
            "command": "rkv-vllm bench --only d",
            "group": results.group.model_copy(
                update={"rows": (results.group.rows[0], Row(name="d", input=128, output=64))}
            ),
            "device": results.device.model_copy(
                update={"limits": HardwareLimits(bytes_per_second=4.4e12, operations_per_second=700e12)}
            ),
            "runs": [engine_run("rkv", [load("a", "compacted", [900, 900, 900, 900], running=10)])],
        }
    )
    both = merge([results, part])
    a, _, _, d = compare(both)
    assert a.sides["rkv"].tokens_per_second == 900 and a.sides["rkv"].windows == 7
    assert d.failures == ["stock: not run", f"rkv: {results.runs[3].failure}"]
    assert both.command == "rkv-vllm bench\nrkv-vllm bench --only d"
    assert both.device.limits == HardwareLimits(bytes_per_second=4.4e12, operations_per_second=790e12)

    other = part.model_copy(update={"group": part.group.model_copy(update={"memory_gib": 24.0})})
    files = []
    for name, run in (("one", results), ("other", other), ("two", part)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(run.model_dump_json())
    shown = CliRunner().invoke(app, ["bench", *(f"--report={file}" for file in files)])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.index("one+two: r1-distill-llama-8b, NVIDIA H200, 72 GiB") < shown.stdout.index(
        "other: r1-distill-llama-8b, NVIDIA H200, 24 GiB"
    )


def test_parts_that_do_not_belong_together_are_refused(results: Results, tmp_path: Path) -> None:
    """Proves that figures of other engines, or of other loads by the same name, are not mixed."""
    other_memory = results.model_copy(update={"group": results.group.model_copy(update={"memory_gib": 24.0})})
    with pytest.raises(ValueError, match="differ in model, memory, options or device"):
        merge([results, other_memory])
    row = results.group.rows[0].model_copy(update={"budget": 300})
    changed = results.model_copy(update={"group": results.group.model_copy(update={"rows": (row,)})})
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, run in zip(files, (results, changed), strict=True):
        file.write_text(run.model_dump_json())
    refused = CliRunner().invoke(
        app, ["bench", *(f"--report={file}" for file in files)], env={"COLUMNS": "500"}
    )
    assert refused.exit_code == 2
    assert "one.json" in refused.output and "two.json: name different loads a" in refused.output


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    """Proves that a missing file, or one of something else, is named."""
    other = tmp_path / "other.json"
    other.write_text("{}")
    for file, said in ((tmp_path / "no.json", "No such file"), (other, "command: Field required")):
        refused = CliRunner().invoke(app, ["bench", "--report", str(file)], env={"COLUMNS": "500"})
        assert refused.exit_code == 2 and file.name in refused.output and said in refused.output
