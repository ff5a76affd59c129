"""`rkv-vllm fidelity` from end to end on the small model: the command, its control, and its order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: Budgets, in tokens: two that are exceeded, and one above every window.
SMALL, LARGE, ABOVE = 24, 48, 1024
BUFFER, PROMPT, FORCED, WINDOWS = 16, 16, 72, 2


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command prints about the licence; one request at a time, so that nothing is rounded twice."""
    out = tmp_path_factory.mktemp("fidelity") / "report.json"
    command = [
        *(sys.executable, "-m", "rkv_vllm.cli", "fidelity"),
        *("--model", str(model), "--text", str(Path(__file__).parents[2] / "LICENSE"), "--json"),
        *("--kv-budget", f"{SMALL},{LARGE},{ABOVE}", "--kv-policy", "recency", "--kv-buffer", str(BUFFER)),
        *("--prompt", str(PROMPT), "--tokens", str(FORCED), "--windows", str(WINDOWS), "--out", str(out)),
        *("--max-num-seqs", "1", "--dtype", "float32", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(1 << 26)),
    ]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        command, env={**os.environ, **environment}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    assert printed == json.loads(out.read_text())
    return printed  # type: ignore[no-any-return]


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
