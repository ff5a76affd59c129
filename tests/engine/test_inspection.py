"""`rkv-vllm inspect` on the small model: what it says was kept, and what predictions lost, is what was."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import texts
from command_process import run_command
from hf_reference import HfReference, Teaching
from typer.testing import CliRunner

from rkv_vllm.cli import app
from rkv_vllm.inspection.report import Inspection, Run

#: In no round do two candidates at the edge of the budget have scores within rounding of one another.
BUDGET, BUFFER, TOKENS, PAGE_SIZE = 48, 24, 150, 32
Policy = Literal["rkv", "invariant", "recency"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

#: Token ids of a run's prompt and answer.
Ids = Callable[[Run], tuple[list[int], list[int]]]


def inspect(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_command(
        *("inspect", "--model", str(model), "--no-chat"),
        *("--kv-budget", str(BUDGET), "--kv-buffer", str(BUFFER), "--max-tokens", str(TOKENS), *options),
        "--ignore-eos",
        *("--max-num-seqs", "1", "--dtype", "float32", "--enforce-eager", "--block-size", str(PAGE_SIZE)),
        *("--kv-cache-memory-bytes", str(1 << 26)),
    )


def inspected(model: Path, *options: str) -> Inspection:
    done = inspect(model, "--json", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return Inspection.model_validate_json(done.stdout)


@pytest.fixture(scope="module")
def found(model: Path) -> Inspection:
    return inspected(model, "--prompt", texts.KING, "--kv-policy", ",".join(POLICIES))


@pytest.fixture(scope="module")
def ids(encode: texts.Encode) -> Ids:
    """The token ids of a run's prompt and answer, by their texts."""
    prompt = encode(texts.KING)

    def of(run: Run) -> tuple[list[int], list[int]]:
        tokens = [encode(piece) for piece in run.tokens]
        assert {len(token) for token in tokens} == {1}
        flat = [token for [token] in tokens]
        assert flat[: len(prompt)] == prompt
        return prompt, flat[len(prompt) :]

    return of


def held(run: Run, round_: int) -> np.ndarray:
    """bool [layers, heads, tokens]: what a page shows of a round."""
    assert run.forgotten is not None
    left = run.forgotten.left.unpack()
    return (left == 0) | (left > round_)


def check_kept(run: Run, teaching: Teaching) -> None:
    """In every round, layer and head exactly the tokens are held that the reference keeps."""
    assert run.forgotten is not None
    assert run.forgotten.rounds == teaching.compacted_at
    for number, kept in enumerate(teaching.kept, start=1):
        seen = run.forgotten.rounds[number - 1]
        expected = np.zeros((*kept.shape[:2], seen), dtype=bool)
        np.put_along_axis(expected, kept.numpy(), True, axis=2)
        assert np.array_equal(held(run, number)[..., :seen], expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_kept_tokens_are_those_of_transformers(
    reference: HfReference, found: Inspection, ids: Ids, policy: Policy
) -> None:
    """Over at least four rounds, in every layer and head, they are those that the float64 reference keeps."""
    run = found.runs[1 + POLICIES.index(policy)]
    assert run.setting is not None and run.setting.policy == policy
    prompt, answer = ids(run)
    teaching = reference.teach(prompt, answer, budget=BUDGET, buffer=BUFFER, policy=policy)
    assert len(teaching.kept) >= 4
    check_kept(run, teaching)


@pytest.mark.parametrize("policy", POLICIES)
def test_kl_is_that_of_transformers(
    reference: HfReference, found: Inspection, ids: Ids, policy: Policy
) -> None:
    """KL of each token is what two runs of the reference over the answer differ by, compacted and not."""
    run = found.runs[1 + POLICIES.index(policy)]
    assert run.kl is not None and run.forgotten is not None
    prompt, answer = ids(run)
    own, full = (
        reference.teach(prompt, answer, budget=budget, buffer=BUFFER, policy=policy).logprobs
        for budget in (BUDGET, 4096)
    )
    expected = (full.exp() * (full - own)).sum(dim=-1)
    assert np.allclose(run.kl, expected, atol=1e-3, rtol=1e-2)
    untouched = run.forgotten.rounds[0] - len(prompt) + 1
    assert run.kl[:untouched] == [0.0] * untouched and max(run.kl) > 0.01


def test_answers_stand_beside_the_full_caches(reference: HfReference, found: Inspection, ids: Ids) -> None:
    """The first run is the full cache's, every answer is greedy, and where it parts from that one is said."""
    full = found.runs[0]
    prompt, answer = ids(full)
    teaching = reference.teach(prompt, answer, budget=4096, buffer=BUFFER, policy="rkv")
    assert teaching.logprobs.argmax(dim=-1).tolist() == answer and len(answer) == TOKENS
    assert full.forgotten is None and "".join(full.tokens).startswith(texts.KING)
    for run in found.runs[1:]:
        same = [ours == theirs for ours, theirs in zip(run.tokens, full.tokens, strict=True)]
        assert run.first_difference == (None if all(same) else same.index(False))
    assert any(run.first_difference is not None for run in found.runs[1:])


def test_whole_pages_are_followed_too(reference: HfReference, model: Path, ids: Ids, tmp_path: Path) -> None:
    """By page, with scores and KL left out, written as a page, whose data say what the reference keeps."""
    out = tmp_path / "report.html"
    done = inspect(
        model,
        *("--prompt", texts.KING, "--kv-budget", "64", "--kv-granularity", "page", "--out", str(out)),
        *("--kv-policy", "rkv", "--no-scores", "--no-kl"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [data] = re.findall(r'<script type="application/json" id="data">(.*)</script>', out.read_text())
    found = Inspection.model_validate_json(data)
    [_, run] = found.runs
    prompt, answer = ids(run)
    teaching = reference.teach(prompt, answer, budget=64, buffer=BUFFER, policy="rkv", page_size=PAGE_SIZE)
    check_kept(run, teaching)
    assert run.kl is None and run.forgotten is not None and run.forgotten.importance is None


def test_wrong_options_are_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the option's name: there is no such model, and nobody hears of that."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # the command would leave it so
    for options, message in (
        (("--kv-budget", "4"), "rkv_budget"),
        (("--kv-budget", "many"), "--kv-budget: takes integers"),
        (("--kv-policy", "best"), "rkv_policy"),
        (("--kv-budget", "20", "--kv-protect", "20"), "20 protected tokens"),
    ):
        done = CliRunner().invoke(app, ["inspect", "--model", "nowhere", "--prompt", "a", *options])
        assert done.exit_code == 2 and message in done.stderr


def test_an_answer_that_does_not_fit_is_refused(model: Path) -> None:
    """What fits is known once the model is loaded, and the option is named."""
    done = inspect(model, "--prompt", "a", "--max-tokens", "100000")
    assert done.returncode == 2 and "--max-tokens: a prompt of" in done.stderr
