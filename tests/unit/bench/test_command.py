"""`rkv-vllm bench`, where nothing gets as far as a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rkv_vllm.bench import run
from rkv_vllm.bench.results import Device, EngineRun, Measure, Results
from rkv_vllm.cli import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the log may be written."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "words",
    [("--bogus-flag",), ("--rkv-arg=--bogus-flag",), ("--stock-arg=--bogus-flag", "--lives=rkv,stock")],
)
def test_an_option_that_vllm_does_not_know_starts_nothing(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that a typing error is told at once, for whichever engine it was meant."""
    monkeypatch.setattr(run, "run_group", lambda *_, **__: pytest.fail("something was started"))
    result = CliRunner().invoke(app, ["bench", "some/model", *words])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "rkv-vllm bench: error: unrecognized arguments: --bogus-flag"
    assert result.stdout == ""


def test_the_reason_of_an_engines_death_is_the_last_that_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proves that no empty table stands in the place of a result, and that a script can tell."""

    def died(group: Any, measure: Measure, **_: Any) -> Results:
        return Results(
            command="",
            started="",
            versions={},
            platform="",
            device=Device(name="CPU", memory_gib=None, limits=None),
            group=group,
            measure=measure,
            runs=[EngineRun(kind=kind, arguments=[], failure="no memory") for kind in group.lives],
        )

    monkeypatch.setattr(run, "run_group", died)
    result = CliRunner().invoke(app, ["bench", "some/model"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == ["stock: no memory", "rkv: no memory"]
    assert "tokens/s" not in result.stdout
    assert result.stdout.splitlines() == ["load: stock: no memory", "load: rkv: no memory"]
