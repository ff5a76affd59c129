"""`rkv-vllm serve` before vLLM starts: its own options, where they go, and how a wrong one is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rkv_vllm.cli import app
from rkv_vllm.server import launch
from rkv_vllm.server.caller_rules import KvSettings
from rkv_vllm.server.operations import OperationSettings
from rkv_vllm.server.rules_by_api_key import RulesByApiKey
from rkv_vllm.settings.engine_args import VALIDATOR


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
    options = (
        "--kv-budget=1024",
        "--kv-budget-max",
        "2048",
        "--kv-policy",
        "rkv",
        "--kv-policies",
        "rkv,snapkv",
        "--port",
        "1",
    )
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
        (("--kv-budget", "auto", "--kv-min-budget", "8"), "--kv-min-budget: "),
        (
            ("--kv-budget", "auto", "--kv-max-budget", "1024"),
            "max_budget: 1024 is not above min_budget, 1024",
        ),
        (("--kv-budget", "auto", "--kv-auto-usage", "0"), "--kv-auto-usage: "),
        (("--kv-budget", "auto", "--kv-granularity", "page"), "--kv-granularity: needs granularity token"),
        (
            ("--kv-budget", "auto", "--kv-budget-max", "4096"),
            "budget: the default, auto, is above budget_max",
        ),
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


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("RKV_KV_BUDGET", "lots", "RKV_KV_BUDGET: takes an integer above 8, a share"),
        ("RKV_KV_MIX_LAMBDA", "7", "RKV_KV_MIX_LAMBDA: "),
        ("RKV_LIMIT_N", "many", "RKV_LIMIT_N: "),
        ("RKV_KV_BUGDET", "512", "RKV_KV_BUGDET is no setting; did you mean RKV_KV_BUDGET?"),
        ("rkv_acess_log", "json", "rkv_acess_log is no setting; did you mean RKV_ACCESS_LOG?"),
        ("RKV_X", "1", "RKV_X is no setting"),
    ],
)
def test_a_wrong_variable_names_itself(
    launched: list[list[str]], variable: str, value: str, said: str
) -> None:
    """Proves that a typing error in the environment of a container stops it, by its name and once."""
    os.environ[variable] = value
    for command in ("serve", "doctor"):
        result = CliRunner().invoke(app, [command, "some/model"])
        assert result.exit_code == 2
        assert result.output.count(said) == 1
    assert launched == []


@pytest.mark.parametrize(
    "variable",
    ["RKV_VLLM_SERVICE_HOST", "RKV_SERVICE_PORT_HTTP", "RKV_PORT", "RKV_VLLM_PORT_8000_TCP_ADDR"],
)
def test_variables_of_service_links_are_not_ours(launched: list[list[str]], variable: str) -> None:
    """Proves that a Kubernetes service whose name begins with rkv stops no pod of its namespace."""
    os.environ[variable] = "10.0.0.1"
    assert serve("some/model").exit_code == 0
    assert launched


def test_a_file_has_every_option(launched: list[list[str]], tmp_path: Path) -> None:
    """Proves that options of ours and of vLLM's come out of one file, and that those given go before it."""
    path = tmp_path / "settings.yaml"
    path.write_text(
        "kv-budget: 256\nkv_buffer: 64\nkv-policies: [invariant, recency]\naccess-log: json\nlimit-n: 4\n"
        "max-model-len: 2048\nenforce-eager: true\nenable-prefix-caching: false\nmodel: from/file\n"
        "additional-config: {theirs: {a: 1}}\nlogits-processors: [a:B]\n"
    )
    os.environ |= {"RKV_KV_BUDGET": "512", "RKV_LIMIT_N": "2"}
    for option in (("--config", str(path)), (f"--config={path}",)):
        result = serve(*option, "--kv-buffer", "32", "--port", "1")
        assert result.exit_code == 0, result.output
        rules = RulesByApiKey.load(KvSettings()).server
        assert (rules.budget, rules.buffer, rules.policies) == (256, 32, ("invariant", "recency"))
        operation = OperationSettings()
        assert (operation.access_log, operation.limit_n) == ("json", 4)
        arguments = launched.pop()
        assert arguments[0] == "from/file" and arguments[-4:-2] != ["--config", str(path)]
        assert arguments.index("--max-model-len") < arguments.index("--port")
        assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(arguments)
        assert '--additional-config.theirs={"a": 1}' in arguments
        processors = arguments.index("--logits-processors")
        assert arguments[processors + 1 : processors + 3] == [VALIDATOR, "a:B"]
    assert serve("--config", str(path), "--port", "1").exit_code == 0
    assert "--additional-config.rkv.buffer=64" in launched.pop()
    assert serve("named/here", "--config", str(path)).exit_code == 0
    assert launched.pop()[0] == "named/here"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kv-bugdet: 256", "kv-bugdet is no option; did you mean kv-budget?"),
        ("max-modl-len: 256", "max-modl-len is no option; did you mean max-model-len?"),
        ("kv-budget: 5", "--kv-budget: takes an integer above 8"),
        ("access-log: xml", "access-log"),
        ("- kv-budget", "takes options and their values"),
        ("a: [", "settings.yaml"),
        ("worker-cls: mine", "--worker-cls is set by rkv-vllm"),
    ],
)
def test_a_wrong_file_is_refused(
    launched: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """Proves that nothing in a file is passed over."""
    monkeypatch.chdir(tmp_path)  # so that its path is short
    Path("settings.yaml").write_text(text)
    for command in ("serve", "doctor"):
        result = CliRunner().invoke(app, [command, "some/model", "--config=settings.yaml"])
        assert result.exit_code == 2
        assert said in " ".join(result.output.replace("│", " ").split())  # lines are broken at 80 columns
    assert launched == []


def test_a_missing_file_is_named(launched: list[list[str]]) -> None:
    """Proves that a wrong path does not start a server without its settings."""
    result = serve("some/model", "--config", "no/such/file.yaml")
    assert result.exit_code == 2 and "no/such/file.yaml" in result.output and launched == []


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
