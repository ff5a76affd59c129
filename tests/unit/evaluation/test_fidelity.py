"""Fidelity without answers: what is compared, when a compaction is due, and the statistics of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from rkv_vllm.cli import app
from rkv_vllm.evaluation import forced_decoder
from rkv_vllm.evaluation.fidelity import (
    AFTER,
    BEFORE,
    Report,
    Schedule,
    distances,
    figure,
    groups_of,
    row_of,
    schedule,
    show,
)
from rkv_vllm.evaluation.fidelity_settings import settings_of
from rkv_vllm.evaluation.fidelity_texts import OwnText, Window
from rkv_vllm.evaluation.forced_decoder import (
    REFERENCE,
    VARIANT,
    ForcedDecoder,
    TeacherForcing,
    WindowComparison,
    compare,
)
from rkv_vllm.settings.config import CompactionSettings, RkvConfig
from rkv_vllm.settings.request_size import RequestSize


def test_predictions_are_compared_by_their_definition() -> None:
    """Proves KL, agreement and log-probabilities on two distributions worked out by hand."""
    full, own = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    kl, same, full_logprob, logprob = compare(full.log() + 3.0, own.log() - 1.0, 1).tolist()
    assert kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert same == 0.0
    assert (full_logprob, logprob) == pytest.approx((math.log(0.25), math.log(0.5)))


def test_equal_logits_differ_by_exactly_nothing() -> None:
    """Proves zero without rounding, masked tokens included, and that a token thought impossible counts."""
    logits = torch.randn(1000)
    logits[5] = -torch.inf
    kl, same, full, own = compare(logits, logits.clone(), 7).tolist()
    assert (kl, same, full - own) == (0.0, 1.0, 0.0)
    assert compare(torch.zeros(2), torch.tensor([0.0, -torch.inf]), 0)[0] == torch.inf


@pytest.mark.parametrize(
    ("prompt", "forced", "budget", "first", "evicted"),
    [
        (20, 60, None, (), 0),
        (20, 60, CompactionSettings(80, 16, "rkv"), (), 0),
        (20, 60, CompactionSettings(30, 10, "rkv"), (21, 31, 41, 51), 40),
        # The step that is compacted feeds the token at that length; the last token is never fed.
        (20, 21, CompactionSettings(30, 10, "rkv"), (), 0),
        (20, 22, CompactionSettings(30, 10, "rkv"), (21,), 10),
        # A prompt that is longer is read whole, gives the first token, and is then compacted.
        (64, 30, CompactionSettings(30, 10, "rkv"), (1, 11, 21), 54),
    ],
)
def test_compactions_follow_from_counts(
    prompt: int, forced: int, budget: CompactionSettings | None, first: tuple[int, ...], evicted: int
) -> None:
    """Proves which prediction is the first without the evicted tokens, up to the ends of prompt and text."""
    assert schedule("token", prompt, forced, budget, 16) == Schedule(first, evicted)


def test_whole_pages_are_counted_too() -> None:
    """Proves the schedule by page, where a round waits for nothing but its pages."""
    planned = schedule("page", 20, 60, CompactionSettings(32, 16, "rkv"), 16)
    assert planned == Schedule((29, 45), 32)


def test_distances_count_from_the_last_compaction() -> None:
    """Proves -1 before any compaction, and 0 for the first prediction after each."""
    assert distances(Schedule((2, 5), 0), 8).tolist() == [-1, -1, 0, 1, 2, 0, 1, 2]
    assert distances(Schedule((), 0), 3).tolist() == [-1, -1, -1]


def test_intervals_are_of_the_windows() -> None:
    """Proves the bootstrap: reproducible, around the mean, wider for fewer windows, none for a single one."""
    values = np.random.default_rng(3).normal(1.0, 0.5, size=400)
    many, few = figure(values, 0), figure(values[:8], 0)
    assert many == figure(values, 0) != figure(values, 1)
    assert many.low is not None and many.high is not None and few.low is not None and few.high is not None
    assert many.low < many.mean < many.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert few.high - few.low > 3 * (many.high - many.low)
    single = figure(values[:1], 0)
    assert (single.mean, single.low, single.high) == (values[0], None, None)


def test_groups_hold_each_token_where_it_belongs() -> None:
    """Proves the split by distance, and each measure's mean in it."""
    since = np.array([-1, -1, 0, 7, 8, 40])
    measured = np.zeros((2, 6, 4))
    measured[..., 0] = [0, 0, 1, 3, 5, 7]
    measured[..., 1] = [1, 1, 0, 1, 0, 1]
    measured[..., 2], measured[..., 3] = -1.0, -1.0 - 0.1 * measured[..., 0]
    groups = {group.name: group for group in groups_of(measured, since, 0)}
    assert {name: group.tokens for name, group in groups.items()} == {
        "all": 12, BEFORE: 4, AFTER: 8, "0-7": 4, "8-15": 2, "32-63": 2
    }  # fmt: skip
    assert groups[BEFORE].kl.mean == 0 and groups[BEFORE].perplexity_ratio.mean == 1
    assert groups[AFTER].kl.mean == 4 and groups[AFTER].top1.mean == 0.5
    assert groups["0-7"].loss.mean == pytest.approx(0.2)
    assert groups["0-7"].perplexity_ratio.high == pytest.approx(math.exp(0.2))
    assert [group.name for group in groups_of(measured, np.full(6, -1), 0)] == ["all"]


def test_settings_are_every_combination_behind_the_control() -> None:
    """Proves the order of the settings, and the errors of wrong ones."""
    config = RkvConfig()
    size = RequestSize(prompt=10, longest=100)
    settings = settings_of(config, size, [64, 32], [16], ["rkv", "recency"])
    assert settings == [
        None,
        *(CompactionSettings(budget, 16, "rkv") for budget in (64, 32)),
        *(CompactionSettings(budget, 16, "recency") for budget in (64, 32)),
    ]
    for budgets, policies, named in (([8], ["rkv"], "rkv_budget"), ([64], ["best"], "rkv_policy")):
        with pytest.raises(ValueError, match=named):
            settings_of(config, size, budgets, [16], policies)
    with pytest.raises(ValueError, match="rkv_budget 0 is the full cache"):
        settings_of(config, size, [0], [16], ["rkv"])


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Iterator[WindowComparison]:
    """Three prompt tokens, two forced ones, over a vocabulary of four."""
    comparison = WindowComparison(Window("text", (0, 1, 2), (3, 1)), 2, lambda: None)
    monkeypatch.setattr(forced_decoder, "_comparison", comparison)
    yield comparison


def test_a_lesson_forces_the_text_and_sees_the_logits_first(comparison: WindowComparison) -> None:
    """Proves that prompt steps are left alone, and others remembered, compared and then overwritten."""
    early = torch.arange(4.0)
    comparison.observe(early, REFERENCE, 2)
    assert early.tolist() == [0, 1, 2, 3]
    for variant in (REFERENCE, 1):
        for index, token in enumerate((3, 1)):
            logits = torch.arange(4.0) * (index + 1)
            comparison.observe(logits, variant, 3 + index)
            assert logits.argmax() == token and logits.isinf().sum() == 3
    assert comparison.reference.tolist() == [[0, 1, 2, 3], [0, 2, 4, 6]]
    assert comparison.seen[1, :, :2].tolist() == [[0.0, 1.0]] * 2
    assert comparison.seen[0].isnan().all()


def test_a_token_predicted_again_counts_once() -> None:
    """Proves that of two predictions of a token the later is kept, and that progress sees one."""
    tokens: list[None] = []
    comparison = WindowComparison(Window("text", (0, 1, 2), (3, 1)), 1, lambda: tokens.append(None))
    for logits in (torch.zeros(4), torch.arange(4.0)):
        comparison.observe(logits, REFERENCE, 3)
    for logits in (torch.zeros(4), torch.arange(4.0)):
        comparison.observe(logits, 0, 3)
    assert len(tokens) == 2
    assert comparison.seen[0, 0, :2].tolist() == [0.0, 1.0]


def test_rows_are_followed_through_the_v1_batch(comparison: WindowComparison) -> None:
    """Proves that removed, added, moved and swapped rows lead to the right requests, strangers left alone."""
    processor = TeacherForcing()
    assert not processor.is_argmax_invariant()
    outputs: list[list[int]] = [[], [3], []]

    def added(row: int, variant: int | None, output: list[int]) -> Any:
        extra = None if variant is None else {VARIANT: variant}
        return (row, SamplingParams(extra_args=extra), [0, 1, 2], output)

    first = [added(0, REFERENCE, outputs[0]), added(1, None, [9]), added(2, 0, outputs[1])]
    processor.update_state(BatchUpdate(batch_size=3, removed=[], added=first, moved=[]))
    moved = [(2, 0, MoveDirectionality.SWAP), (0, 1, MoveDirectionality.UNIDIRECTIONAL)]
    processor.update_state(BatchUpdate(batch_size=3, removed=[1], added=[], moved=moved))
    processor.update_state(None)
    # Row 0 went to 2, and row 2 over 0 to 1.
    comparison.reference = torch.zeros(2, 4)
    logits = torch.arange(12.0).reshape(3, 4)
    processor.apply(logits)
    assert logits[0].tolist() == [0, 1, 2, 3]
    assert comparison.reference[0].tolist() == [8, 9, 10, 11]  # no output yet: the first forced token
    assert comparison.seen[0, 1].isfinite().all() and comparison.seen[0, 0].isnan().all()
    assert logits.argmax(dim=1).tolist() == [3, 1, 3]


def test_slots_are_followed_through_the_v2_batch(comparison: WindowComparison) -> None:
    """Proves that rows find their request slots, and that a slot forgets its last request."""
    processor = TeacherForcing()
    assert processor.add_request(4, SamplingParams(extra_args={VARIANT: REFERENCE}))
    assert processor.add_request(2, SamplingParams(extra_args={VARIANT: 1}))
    assert not processor.add_request(2, SamplingParams())
    context: Any = SimpleNamespace(
        idx_mapping_np=np.array([2, 4]), seq_lens_upper_bound_np=np.array([4, 4], dtype=np.int32)
    )
    logits = torch.arange(8.0).reshape(2, 4)
    processor.apply(logits, context)
    assert logits[0].tolist() == [0, 1, 2, 3]
    assert comparison.reference[1].tolist() == [4, 5, 6, 7]
    assert logits[1].argmax() == 1


def test_nothing_is_touched_outside_a_lesson() -> None:
    """Proves that warm-up's logits, which belong to no window, stay as they are."""
    processor = TeacherForcing()
    processor.add_request(0, SamplingParams(extra_args={VARIANT: 0}))
    assert processor.apply(torch.ones(1, 4)).tolist() == [[1.0] * 4]


def test_the_table_shows_controls_and_losses() -> None:
    """Proves that settings without a compaction, without a time before it, and with both are shown apart, and
    above them who wrote the text."""
    measured = np.zeros((2, 4, 4))
    measured[..., 0] = 0.25
    rows = [
        row_of(None, Schedule((), 0), 0 * measured, 0),
        row_of(CompactionSettings(64, 16, "rkv"), Schedule((0,), 16), measured, 0),
        row_of(CompactionSettings(80, 16, "rkv"), Schedule((2,), 16), measured, 0),
    ]
    report = Report(
        command="rkv-vllm fidelity", model="m", device="cpu", dtype="float32", texts=["t"], windows=2,
        prompt_tokens=8, forced_tokens=4, granularity="token", scope="head", order="temporal", mix_lambda=0.1,
        seed=0, full_perplexity=2.0, reference_bytes=64, versions={}, rows=rows,
    )  # fmt: skip
    printed = shown(report).splitlines()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed]
    cells = {line[0]: line[1:] for line in lines if len(line) == 7}
    assert cells["full"] == ["0", "0.0e+00", "-", "-", "-", "x 1.0000"]
    assert cells["rkv, 64 + 16"][:3] == ["16", "-", "0.2500"]
    assert cells["rkv, 80 + 16"][:3] == ["16", "2.5e-01", "0.2500"]
    assert "4 tokens; perplexity" in shown(report)
    report.own_text = OwnText(
        model="w", temperature=0.5, seed=7, sampling_defaults={}, forbidden_tokens=[], texts=[]
    )
    assert "4 tokens written by w (temperature 0.5, seed 7); perplexity" in shown(report)


def shown(report: Report) -> str:
    file = StringIO()
    show(report, Console(width=120, file=file))
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--kv-budget", "8"), "rkv_budget takes 0 (full cache), an integer above 8"),
        (("--kv-budget", "many"), "--kv-budget: takes integers separated by commas, not 'many'"),
        (("--kv-budget", "64", "--kv-buffer", "1"), "rkv_buffer takes an integer of at least 8"),
        (("--kv-budget", "64", "--kv-policy", "best"), "rkv_policy takes one of"),
        (("--kv-budget", "64", "--kv-granularity", "page", "--kv-scope", "layer"), "scope: layer needs"),
        (("--kv-budget", "64"), "no/such/file"),
        (
            ("--kv-budget", "64", "--own-text"),
            "takes one of --text, --own-text, --own-text-from, not --text and",
        ),
    ],
)
def test_wrong_options_are_named_before_an_engine_starts(options: tuple[str, ...], named: str) -> None:
    """Proves that each mistake is an error of the command line with the option's name."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["fidelity", "--model", "m", "--text", "no/such/file", *options]
    )
    assert result.exit_code == 2
    assert named in result.output


def test_a_context_below_a_window_is_refused_before_an_engine_starts() -> None:
    """Proves that the context which the user asked for holds a window, or the error says what it takes."""
    words = ["fidelity", "--model", "m", "--text", __file__, "--kv-budget", "64", "--max-model-len", "512"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert result.exit_code == 2
    assert "--max-model-len: a window takes 1024 tokens, not 512" in result.output


def test_windows_are_read_without_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that drafts are refused before an engine starts: every token of a window is given."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # which the decoder sets
    drafts = '--speculative-config={"method": "ngram", "num_speculative_tokens": 3}'
    with pytest.raises(ValueError, match="nothing to draft"):
        ForcedDecoder("some/model", [drafts], RkvConfig(), 64)
