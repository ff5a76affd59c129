"""`rkv-vllm fidelity` from end to end on the small model: the command, its control, and its own texts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_process import run_command

#: Budgets, in tokens: two that are exceeded, and one above every window.
SMALL, LARGE, ABOVE = 24, 48, 1024
BUFFER, PROMPT, FORCED, WINDOWS = 16, 16, 72, 2

#: Asked for an own text: the answer is short, so that the model wants to stop long before the end.
INSTRUCTION = "What is the capital of France? Answer in one word."
OWN_PROMPT, OWN_FORCED, OWN_SMALL = 64, 40, 40
OWN_SIZE = ("--prompt", str(OWN_PROMPT), "--tokens", str(OWN_FORCED))


def fidelity(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command, one request at a time, so that nothing is rounded twice."""
    return run_command(
        *("fidelity", "--model", str(model), "--json", "--kv-policy", "recency", "--kv-buffer", str(BUFFER)),
        *(*options, "--max-num-seqs", "1", "--dtype", "float32", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(1 << 26)),
    )


def measured(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """What the command prints, which it also writes to the file."""
    done = fidelity(model, *options, "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    assert printed == json.loads(out.read_text())
    return printed  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is measured of the licence."""
    return measured(
        model,
        tmp_path_factory.mktemp("fidelity") / "report.json",
        *("--text", str(Path(__file__).parents[2] / "LICENSE"), "--kv-budget", f"{SMALL},{LARGE},{ABOVE}"),
        *("--prompt", str(PROMPT), "--tokens", str(FORCED), "--windows", str(WINDOWS)),
    )


class OwnTextRun:
    """A run over texts that the model wrote.

    Attributes:
        options: that others share with it, to write the same.
        out: file of the result.
        report: the result.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        asked, self.out = folder / "asked.txt", folder / "own.json"
        asked.write_text(f"{INSTRUCTION}\n")
        self.options = (
            *("--own-text", "--instructions", str(asked), "--temperature", "0.9", "--seed", "5"),
            *OWN_SIZE,
        )
        self.budgets = ("--kv-budget", f"{OWN_SMALL},{ABOVE}")
        self.report = measured(model, self.out, *self.options, *self.budgets, "--windows", str(WINDOWS))


@pytest.fixture(scope="module")
def own(model: Path, tmp_path_factory: pytest.TempPathFactory) -> OwnTextRun:
    return OwnTextRun(model, tmp_path_factory.mktemp("own"))


def groups(report: dict[str, Any], budget: int | None) -> dict[str, dict[str, Any]]:
    row = next(row for row in report["rows"] if row["budget"] == budget)
    return {group["name"]: group for group in row["groups"]}


def test_nothing_differs_where_nothing_was_compacted(report: dict[str, Any]) -> None:
    """The full cache again, a budget above the text, and tokens before a compaction: zero, not nearly so."""
    unchanged = [groups(report, None)["all"], groups(report, ABOVE)["all"]]
    assert [group["tokens"] for group in unchanged] == [WINDOWS * FORCED] * 2
    unchanged += [groups(report, budget)["before the first compaction"] for budget in (SMALL, LARGE)]
    assert [group["tokens"] for group in unchanged[2:]] == [
        WINDOWS * (budget + BUFFER - PROMPT + 1) for budget in (SMALL, LARGE)
    ]
    for group in unchanged:
        assert group["kl"] == group["loss"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert group["top1"]["mean"] == group["perplexity_ratio"]["mean"] == 1.0


def test_a_smaller_budget_changes_more(report: dict[str, Any]) -> None:
    """Compacted predictions differ, and on average more with fewer tokens kept."""
    small, large = (groups(report, budget) for budget in (SMALL, LARGE))
    assert small["all"]["kl"]["mean"] > large["all"]["kl"]["mean"] > 0
    after = "after the first compaction"
    assert small[after]["kl"]["mean"] > large[after]["kl"]["mean"]
    assert small[after]["top1"]["mean"] < 1.0


def test_the_report_says_what_was_run(report: dict[str, Any]) -> None:
    """Counts, lengths and memory are those of the run: compactions follow from the lengths."""
    counts = {row["budget"]: (row["compactions"], row["evicted_tokens"]) for row in report["rows"]}
    assert counts == {None: (0, 0), SMALL: (3, 3 * BUFFER), LARGE: (2, 2 * BUFFER), ABOVE: (0, 0)}
    assert (report["windows"], report["texts"], report["dtype"]) == (WINDOWS, ["LICENSE"], "float32")
    assert report["reference_bytes"] == FORCED * 49152 * 4
    assert 1.0 < report["full_perplexity"] < 50.0
    assert set(groups(report, SMALL)) >= {"0-7", "8-15"}


def test_own_texts_are_as_long_as_asked(own: OwnTextRun, model: Path) -> None:
    """A model that would answer in a word goes on, its end tokens never written, and two texts differ."""
    written = own.report["own_text"]
    texts = written["texts"]
    config = json.loads((model / "generation_config.json").read_text())
    ends = {config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]}
    assert set(written["forbidden_tokens"]) == ends
    assert len(texts) == WINDOWS and own.report["texts"] == []
    for text in texts:
        assert text["instruction"] == INSTRUCTION
        assert len(text["tokens"]) == OWN_PROMPT + OWN_FORCED
        assert not ends & set(text["tokens"][text["instruction_tokens"] :])
    first, second = texts
    shared = first["instruction_tokens"]
    assert 0 < shared < OWN_PROMPT and first["tokens"][:shared] == second["tokens"][:shared]
    assert first["seed"] != second["seed"] and first["text"] != second["text"]


def test_own_texts_are_measured_like_given_ones(own: OwnTextRun) -> None:
    """Every window counts its decoded tokens alone, a budget above it changes nothing, a small one does."""
    control, above, small = (groups(own.report, budget)["all"] for budget in (None, ABOVE, OWN_SMALL))
    for unchanged in (control, above):
        assert unchanged["tokens"] == WINDOWS * OWN_FORCED
        assert unchanged["kl"] == unchanged["loss"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert small["kl"]["mean"] > 0
    row = next(row for row in own.report["rows"] if row["budget"] == OWN_SMALL)
    assert row["evicted_tokens"] == OWN_PROMPT - OWN_SMALL + (row["compactions"] - 1) * BUFFER > 0


def test_the_same_seed_writes_the_same_text(own: OwnTextRun, model: Path, tmp_path: Path) -> None:
    """A second run, of other budgets and fewer windows, has the text of the first and all that led to it."""
    again = measured(
        model, tmp_path / "again.json", *own.options, "--kv-budget", str(ABOVE), "--windows", "1"
    )
    first = own.report["own_text"]
    assert again["own_text"] == {**first, "texts": first["texts"][:1]}
    assert {name: first[name] for name in ("temperature", "seed", "sampling_defaults")} == {
        "temperature": 0.9, "seed": 5, "sampling_defaults": {}
    }  # fmt: skip


def test_a_result_is_enough_to_measure_again(own: OwnTextRun, model: Path, tmp_path: Path) -> None:
    """A run over the texts in the first one's file finds the same, to the bit, and hands the texts on."""
    options = ("--own-text-from", str(own.out), *OWN_SIZE, "--seed", "5")
    again = measured(model, tmp_path / "again.json", *options, *own.budgets)
    for name in ("rows", "own_text", "full_perplexity", "windows"):
        assert again[name] == own.report[name]


def test_a_model_without_a_chat_template_is_refused(model: Path, tmp_path: Path) -> None:
    """The error names the option, where a question could only be sent in a form that the model never saw."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if "chat_template" not in file.name:
            (bare / file.name).symlink_to(file)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").unlink()
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    done = fidelity(bare, "--own-text", "--kv-budget", str(ABOVE))
    assert done.returncode == 2
    assert "--own-text: the model has no chat template" in done.stderr
