"""Options of commands that are made of a model's fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from rkv_vllm.cli import app
from rkv_vllm.cli.options import SHARED_SETTINGS, OptionGroup, takes
from rkv_vllm.server.caller_rules import KvSettings
from rkv_vllm.settings.config import RkvConfig

README = Path(__file__).parents[3] / "README.md"


class Settings(BaseModel):
    size: int | None = Field(default=None, description="How large.")
    color: Literal["red", "blue"] = "red"
    size_or_all: int | Literal["all"] = "all"
    names: tuple[str, ...] = ()
    is_on: bool = False


def run(*arguments: str) -> Any:
    """What a command with options made of `Settings` is called with."""
    received: list[Any] = []
    commands = typer.Typer()

    @commands.command()
    @takes(OptionGroup("settings", Settings, prefix="--x-", environment="X_"))
    def command(settings: dict[str, Any], other: int = 3) -> None:
        """A command."""
        received.append((settings, other))

    result = CliRunner().invoke(commands, list(arguments), env={"COLUMNS": "200"})
    return received[0] if received else result.output


def test_a_command_receives_what_was_given() -> None:
    """Proves that options arrive under their field's name, of the field's type, and others not at all."""
    assert run() == ({}, 3)
    assert run("--x-size", "5", "--x-is-on", "--other", "4") == ({"size": 5, "is_on": True}, 4)
    assert run("--x-size-or-all", "7", "--x-names", "a,b") == ({"size_or_all": "7", "names": "a,b"}, 3)


@pytest.mark.parametrize("wrong", [("--x-color", "green"), ("--x-size", "many"), ("--x-no-is-on",)])
def test_a_wrong_option_is_refused(wrong: tuple[str, ...]) -> None:
    """Proves that choices and numbers are checked, and that a flag has no opposite."""
    assert wrong[0] in run(*wrong)


def test_help_says_what_a_field_says() -> None:
    """Proves that description and variable of a field stand in the help."""
    shown = run("--help")
    assert "How large. (default: none) [X_SIZE]" in shown and "red|blue" in shown
    assert "(default: red)" in shown and "(default: all)" in shown and "(default: off)" in shown


@pytest.mark.parametrize(
    ("command", "prefix", "fields"),
    [
        ("serve", "--kv-", tuple(KvSettings.model_fields)),
        ("doctor", "--kv-", tuple(RkvConfig.model_fields)),
        ("args", "--kv-", tuple(RkvConfig.model_fields)),
        # What is compared has budgets of its own.
        ("eval", "--kv-", (*SHARED_SETTINGS, "auto_usage", "budget", "buffer", "policy", "protect")),
        # What protection brings is measured by answers.
        ("fidelity", "--kv-", (*SHARED_SETTINGS, "budget", "buffer", "policy")),
        ("inspect", "--kv-", (*SHARED_SETTINGS, "budget", "buffer", "policy", "protect")),
        ("bench", "--kv-", ("budget", "buffer", "policy")),
    ],
)
def test_every_setting_is_an_option(command: str, prefix: str, fields: tuple[str, ...]) -> None:
    """Proves that a new setting appears in every command by itself."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    options = {option for parameter in group.commands[command].params for option in parameter.opts}
    assert {f"{prefix}{name.replace('_', '-')}" for name in fields} <= options
    assert set(RkvConfig.model_fields) <= set(KvSettings.model_fields)


def test_old_names_work_and_are_not_shown() -> None:
    """Proves that scripts which say `--budget` go on working, and that only the one name is taught."""
    for words in ("--budget=512 --mix-lambda=0.2", "--kv-budget=512 --kv-mix-lambda=0.2"):
        printed = CliRunner().invoke(app, ["args", *words.split()]).stdout
        assert "rkv.budget=512" in printed and "rkv.mix_lambda=0.2" in printed
    refused = CliRunner().invoke(app, ["eval", "--task=derivation", "--out=x", "--model=m", "--budgets=7"])
    assert "--kv-budget: takes" in refused.stderr
    for command in ("args", "eval", "fidelity", "inspect", "bench"):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        assert "--kv-budget" in text and "--budget" not in text


def test_the_readme_has_every_setting() -> None:
    """Proves that the table of settings forgets none that all requests share, or have a default for."""
    text = README.read_text()
    assert all(f"| `--kv-{name.replace('_', '-')}` |" in text for name in RkvConfig.model_fields)
