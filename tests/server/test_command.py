"""`rkv-vllm serve` before vLLM starts: its own options, where they go, and how a wrong one is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rkv_vllm.cli import app
from rkv_vllm.server import launch
from rkv_vllm.server.caller_rules import KvSettings, RulesByApiKey


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the command may write to."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RKV_")}
    monkeypatch.setattr(os, "environ", {**variables, "COLUMNS": "200"})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What vLLM was started with."""
    calls: list[list[str]] = []
    monkeypatch.setattr(launch, "launch", calls.append)
    return calls


def serve(*options: str) -> Result:
    return CliRunner().invoke(app, ["serve", *options])


def test_flags_go_before_the_environment_and_reach_vllms_processes(launched: list[list[str]]) -> None:
    """Proves that the middleware, which sees only the environment, reads what the command line said."""
    os.environ |= {"RKV_KV_BUDGET": "512", "RKV_KV_BUFFER": "64"}
    options = ("--kv-budget=1024", "--kv-budget-max", "2048", "--kv-policies", "rkv,snapkv", "--port", "1")
    result = serve("some/model", *options)
    assert result.exit_code == 0, result.output
    rules = RulesByApiKey.load(KvSettings()).server
    assert (rules.budget, rules.budget_max, rules.buffer) == (1024, 2048, 64)
    assert rules.policies == ("rkv", "snapkv")
    [arguments] = launched
    assert arguments[:3] == ["some/model", "--port", "1"]
    assert "--additional-config.rkv.budget=1024" in arguments
    assert "--additional-config.rkv.buffer=64" in arguments
    assert "KV cache: default budget 1024, allowed 9 to 2048; buffer 64" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--kv-budget", "8"), "--kv-budget: takes an integer above 8, a share"),
        (("--kv-buffer", "lots"), "'--kv-buffer'"),
        (("--access-log", "xml"), "--access-log"),
        (("--limit-n", "0"), "--limit-n: "),
        (("--kv-beyond-pool",), "--kv-beyond-pool: needs a default budget"),
        (("--kv-budget-min", "512", "--kv-budget-max", "256"), "budget_min: 512 is above budget_max, 256"),
        (("--kv-policies", "rkv,best"), "--kv-policies: "),
        (("--kv-key-policies", "no/such/file"), "no/such/file"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_starts(
    launched: list[list[str]], options: tuple[str, ...], named: str
) -> None:
    """Proves that an operator sees at once which setting it is."""
    result = serve("some/model", *options)
    assert result.exit_code == 2
    assert named in result.output
    assert launched == []


def test_the_rules_of_keys_are_printed_without_the_keys(launched: list[list[str]], tmp_path: Path) -> None:
    """Proves that an operator can see in the log that the file was read."""
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    path = tmp_path / "keys.yaml"
    path.write_text(f"{digest}: {{budget: 256}}")
    output = serve("some/model", f"--kv-key-policies={path}").output
    assert "API key 9f86d081884c...: default budget 256" in output
    assert digest not in output


def test_help_shows_our_options_apart() -> None:
    """Proves that they stand in a group of their own, each with the variable that sets it too."""
    output: Any = serve("--help").output
    group = output.partition("KV cache")[2]
    for name in KvSettings.model_fields:
        assert f"--kv-{name.replace('_', '-')}" in group
        assert f"RKV_KV_{name.upper()}" in group
