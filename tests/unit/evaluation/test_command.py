"""`rkv-vllm eval` and `eval-report` from their words to their files; the engine is a list."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
from stub_engine import StubEngine
from typer.testing import CliRunner, Result

from rkv_vllm.cli import app
from rkv_vllm.evaluation import command
from rkv_vllm.evaluation.engines import EngineError, Sampling

FILES = {"answers.jsonl", "plot.svg", "run.json", "summary.json", "table.md"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What engines were started with; they answer the questions right, but not with policy random."""
    calls: list[Any] = []

    @asynccontextmanager
    async def in_process(*arguments: Any) -> AsyncIterator[StubEngine]:
        calls.append(arguments)
        yield StubEngine(
            lambda prompt, setting: "?" if setting.policy == "random" else str(prompt).rpartition(" ")[2]
        )

    monkeypatch.setattr(command, "in_process", in_process)
    return calls


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f'{{"question": "Say {i}", "answer": {i}}}\n' for i in range(6)))
    return path


def evaluate(questions: Path, out: Path, *options: str) -> Result:
    words = ["eval", "--task", f"jsonl:{questions}", "--out", str(out), "--model", "some/model"]
    return CliRunner().invoke(app, [*words, *options], env={"COLUMNS": "80"})


def plain(text: str) -> str:
    """Without the frames and line ends that a terminal's width brings."""
    return " ".join(text.replace("\u2502", " ").split())


def test_a_run_and_its_files(started: list[Any], questions: Path, tmp_path: Path) -> None:
    """Proves that table, JSON and files say the same, and that vLLM is given its own options."""
    out = tmp_path / "out"
    options = ("--kv-budget=32", "--kv-policy=rkv,random", "--kv-buffer=8", "--kv-mix-lambda=0.3", "--seed=5")
    result = evaluate(questions, out, *options, "--max-model-len", "512", "--enforce-eager", "--json")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == FILES
    [(model, arguments, config, sampling)] = started
    assert (model, arguments) == ("some/model", ["--max-model-len", "512", "--enforce-eager"])
    assert config.mix_lambda == 0.3 and sampling == Sampling(0.0, 1.0, None, True)

    summary = json.loads(result.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert [row["setting"] for row in summary["rows"]] == ["full", "rkv:32:8", "random:32:8"]
    assert [row["right"] for row in summary["rows"]] == [6, 6, 0]
    assert summary["settings"]["server_wide"] == {"mix_lambda": 0.3}
    assert summary["settings"]["seed"] == 5 and summary["warnings"] == []
    assert len((out / "answers.jsonl").read_text().splitlines()) == 18
    assert "| rkv 32, mix_lambda 0.3 | 8 | 100.0 | 61.0-100.0 | 6 |" in (out / "table.md").read_text()
    plot = (out / "plot.svg").read_text()
    assert ElementTree.fromstring(plot).tag.endswith("svg")
    assert "rkv, buffer 8, mix_lambda 0.3" in plot and "full cache" in plot

    again = evaluate(questions, out, *options, "--max-model-len", "512", "--enforce-eager")
    assert "random 32, mix_lambda 0.3" in again.stdout and "WARNING" not in again.stdout
    assert (out / "plot.svg").read_text() == plot, "the same answers give the same file"


def test_rows_that_were_not_compacted_are_loud(started: list[Any], questions: Path, tmp_path: Path) -> None:
    """Proves that a curve without compaction cannot be mistaken for one with it, on screen or in files."""
    out = tmp_path / "out"
    result = evaluate(questions, out, "--kv-budget=4096", "--kv-policy=rkv")
    warning = "rkv 4096, buffer 128: this row was NOT compacted: no token was evicted"
    assert f"WARNING: {warning}" in plain(result.stdout)
    assert warning in (out / "table.md").read_text()
    assert json.loads((out / "summary.json").read_text())["warnings"] == [warning]


def test_another_run_is_not_mixed_in(started: list[Any], questions: Path, tmp_path: Path) -> None:
    """Proves that a folder goes on as the run it holds, with more problems and budgets, or not at all."""
    out = tmp_path / "out"
    assert evaluate(questions, out, "--kv-budget=32", "--problems=2").exit_code == 0
    more = json.loads(evaluate(questions, out, "--kv-budget=32,48", "--problems=3", "--json").stdout)
    assert [row["answers"] for row in more["rows"]] == [3] * 11
    for options in (("--seed=1",), ("--temperature=0.6",), ("--kv-mix-lambda=0.5",), ("--enforce-eager",)):
        refused = evaluate(questions, out, "--kv-budget=32", *options)
        assert refused.exit_code == 2
        assert "holds another run: " in plain(refused.stderr)


def test_a_run_that_answered_nothing_is_no_run(
    started: list[Any], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that after an engine that could not start, the same folder takes corrected options."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(command, "in_process", Mock(side_effect=EngineError("no memory")))
        failed = evaluate(questions, out, "--kv-budget=32", "--block-size=16")
        assert failed.exit_code == 1 and "no memory" in failed.stderr
    assert evaluate(questions, out, "--kv-budget=32", "--block-size=32").exit_code == 0


def test_percent_is_published_as_tokens(started: list[Any], questions: Path, tmp_path: Path) -> None:
    """Proves that a budget in percent comes out as both, and that the length it is of is kept."""
    summary = json.loads(evaluate(questions, tmp_path / "out", "--kv-budget=40%", "--json").stdout)
    assert summary["full_length"] == 100
    assert {(row["budget"], row["budget_percent"]) for row in summary["rows"][1:]} == {(40, 40)}
    refused = evaluate(questions, tmp_path / "out", "--kv-budget=40%", "--full-length=50")
    assert refused.exit_code == 2 and "full-length" in refused.stderr


def test_auto_has_a_row_and_a_curve_of_its_own(started: list[Any], questions: Path, tmp_path: Path) -> None:
    """Proves that fixed and elastic budgets are compared in one run, and that no reader takes one for the
    other."""
    out = tmp_path / "out"
    options = ("--kv-budget=40%,auto:40%", "--kv-policy=rkv", "--kv-buffer=8", "--kv-auto-usage=0.8")
    result = evaluate(questions, out, *options)
    assert result.exit_code == 0, result.output
    assert "under this run's load" in plain(result.stdout)
    table = (out / "table.md").read_text()
    assert "| rkv 40 (40 %), auto_usage 0.8 | 8 | 100.0 |" in table
    assert "| rkv auto:40 (40 %), auto_usage 0.8 | 8 | 100.0 |" in table and "| 100.0 | 48 |" in table
    assert "rkv, auto, buffer 8" in (out / "plot.svg").read_text()


def test_several_runs_in_one_table(started: list[Any], questions: Path, tmp_path: Path) -> None:
    """Proves that runs with different server-wide settings are merged and told apart."""
    for weight in ("0.1", "0.5"):
        evaluate(
            questions, tmp_path / weight, "--kv-budget=32,64", "--kv-policy=rkv", f"--kv-mix-lambda={weight}"
        )
    merged = tmp_path / "merged"
    words = ["eval-report", str(tmp_path / "0.1"), str(tmp_path / "0.5"), "--out", str(merged)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "rkv 64, mix_lambda 0.5" in result.stdout
    assert {path.name for path in merged.iterdir()} == {"runs.json", "table.md", "plot.svg"}
    runs = json.loads((merged / "runs.json").read_text())["runs"]
    assert [run["settings"]["server_wide"]["mix_lambda"] for run in runs] == [0.1, 0.5]
    plot = (merged / "plot.svg").read_text()
    assert "buffer 128, mix_lambda 0.1" in plot and "buffer 128, mix_lambda 0.5" in plot
    missing = CliRunner().invoke(app, ["eval-report", str(tmp_path / "nothing")])
    assert missing.exit_code == 2 and "nothing" in missing.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--kv-budget=7",), "--kv-budget: "),
        (("--kv-budget=64,auto:64", "--kv-granularity=page"), "--kv-budget: auto needs granularity token"),
        (("--kv-policy=best",), "--kv-policy: "),
        (("--kv-buffer=7",), "--kv-buffer: "),
        (("--samples=2",), "samples: "),
        (("--task-option=match",), "task-option: "),
        (("--task-option=match=best",), "task-option match: "),
        (("--task=best",), "task: "),
        (("--task=jsonl:no/such/file",), "no/such/file"),
        (("--kv-mix-lambda=2",), "--kv-mix-lambda: "),
        (("--problems=0",), "--problems"),
        (("--base-url=http://127.0.0.1:9", "--kv-mix-lambda=0.5"), "has its own settings: mix_lambda"),
        (("--base-url=http://127.0.0.1:9", "--max-model-len=9"), "has its own settings: --max-model-len=9"),
    ],
)
def test_wrong_options_are_named(
    started: list[Any], questions: Path, tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    """Proves that a wrong option ends in one error that names it, before an engine starts."""
    result = evaluate(questions, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert named in plain(result.stderr)
    assert "Traceback" not in result.output
    assert started == []


def test_a_server_that_does_not_answer(questions: Path, tmp_path: Path) -> None:
    """Proves that a wrong address ends in an error that says so."""
    result = evaluate(questions, tmp_path / "out", "--base-url=http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "base-url: http://127.0.0.1:9 does not answer" in plain(result.stderr)
