"""`rkv-vllm eval` in a process of its own, with a real engine and a real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import texts

OPTIONS = (
    *("--dtype", "float32", "--block-size", "32", "--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", "256M", "--max-num-batched-tokens", "512", "--enforce-eager"),
)
BUFFER = 16


def test_settings_are_compacted_as_asked_beside_the_full_cache(model: Path, tmp_path: Path) -> None:
    """Proves that in one engine each setting evicts down to its budget, the full cache, a large budget and
    budget auto in a large pool evict nothing, and that those answer alike."""
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out"
    lines = [{"question": texts.squares(12 + i), "answer": "0"} for i in range(2)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        *(sys.executable, "-m", "rkv_vllm.cli", "eval", "--model", str(model), "--json"),
        *("--task", f"jsonl:{questions}", "--task-option", "match=numeric", "--out", str(out)),
        *("--kv-budget", "32,50%,900,auto:32", "--kv-buffer", str(BUFFER), "--kv-policy", "rkv,recency"),
        *("--max-tokens", "48", *OPTIONS),
    ]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    ended = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout)

    half = round(summary["full_length"] / 2)
    budgets = (32, half, 900, "auto:32")
    settings = [f"{policy}:{budget}:{BUFFER}" for budget in budgets for policy in ("rkv", "recency")]
    assert [row["setting"] for row in summary["rows"]] == ["full", *settings]
    assert all(row["answers"] == 2 for row in summary["rows"])
    assert [warning.partition(",")[0] for warning in summary["warnings"]] == [
        *("rkv 900", "recency 900"),
        *("rkv auto:32", "recency auto:32"),  # memory was never short
    ]

    outputs: dict[str, dict[str, str]] = {}
    for answer in map(json.loads, (out / "answers.jsonl").read_text().splitlines()):
        outputs.setdefault(answer["setting"], {})[answer["problem"]] = answer["output"]
        length, evicted = answer["prompt_tokens"] + answer["output_tokens"], answer["evicted_tokens"]
        if answer["budget"] in ("full", 900, "auto"):
            assert evicted == 0
        else:
            assert answer["budget"] <= length - evicted <= answer["budget"] + BUFFER + 1
    for budget in (900, "auto:32"):
        assert outputs["full"] == outputs[f"rkv:{budget}:{BUFFER}"] == outputs[f"recency:{budget}:{BUFFER}"]
    assert all(outputs["full"].values())
