"""Fidelity without answers: what is compared, at which distance from a compaction, and how sure it is.

A text is cut into windows, each a prompt and the tokens that follow it. The engine is made to decode exactly
those tokens once with its full cache and once with each budget, so that compactions happen as in serving.
At each token the two predictions of it are compared over the whole vocabulary. No vLLM here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from rkv_vllm.decisions.auto_lengths import make_request_lengths
from rkv_vllm.evaluation.fidelity_settings import Setting
from rkv_vllm.evaluation.fidelity_texts import OwnText
from rkv_vllm.settings.config import CompactionSettings, Granularity, PolicyName

#: What is measured of each token, in this order.
MEASURES = ("kl", "top1", "full_logprob", "logprob")
#: Tokens from the last compaction at which a group begins; each ends where the next begins.
DISTANCES = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
#: Samples of the bootstrap, and the share of them inside an interval.
RESAMPLES, CONFIDENCE = 2000, 0.95
BEFORE, AFTER = "before the first compaction", "after the first compaction"


class Figure(BaseModel):
    """A mean over the tokens, and its bootstrap interval over the windows; none with fewer than two."""

    mean: float
    low: float | None
    high: float | None


class Group(BaseModel):
    """Some of the tokens.

    Attributes:
        name: which they are; a range is the distance from the last compaction, in tokens.
        tokens: how many.
        kl: KL divergence of the full cache's prediction from the compacted one's, in nats a token.
        top1: share of the tokens where both predict the same next token.
        loss: log-likelihood that the text loses, in nats a token.
        perplexity_ratio: the compacted cache's perplexity over the full one's.
    """

    name: str
    tokens: int
    kl: Figure
    top1: Figure
    loss: Figure
    perplexity_ratio: Figure


class Row(BaseModel):
    """One setting over all windows; its compactions and evicted tokens are those of each window."""

    budget: int | None
    buffer: int | None
    policy: PolicyName | None
    compactions: int
    evicted_tokens: int
    groups: list[Group]

    def group(self, name: str) -> Group | None:
        return next((group for group in self.groups if group.name == name), None)


class Report(BaseModel):
    """Everything that was measured, and how.

    Attributes:
        command: that measured it.
        texts: names of the files; none where the model wrote its own.
        windows: number of windows, each of `prompt_tokens` and `forced_tokens`.
        full_perplexity: of the forced tokens with the full cache.
        reference_bytes: host memory that held the full cache's logits of one window at a time.
        rows: the control first, the full cache run a second time among the others: its KL is the noise of
            the arithmetic in that batch.
        own_text: what the model wrote, where it did.
    """

    command: str
    model: str
    device: str
    dtype: str
    texts: list[str]
    windows: int
    prompt_tokens: int
    forced_tokens: int
    granularity: Granularity
    scope: str
    order: str
    mix_lambda: float
    seed: int
    full_perplexity: float
    reference_bytes: int
    versions: dict[str, str]
    rows: list[Row]
    own_text: OwnText | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a request is compacted: the forced tokens that are the first to be predicted without the evicted
    ones, and how many tokens are gone in the end."""

    first_affected: tuple[int, ...]
    evicted_tokens: int


def schedule(
    granularity: Granularity, prompt: int, forced: int, budget: CompactionSettings | None, page_size: int
) -> Schedule:
    """Works out from counts when the engine compacts a request of these lengths, in tokens."""
    if budget is None:
        return Schedule((), 0)
    lengths = make_request_lengths(granularity, prompt, budget, page_size)
    affected: list[int] = []
    # The step at logical length n feeds token n, and predicts the one behind it. The last token is not fed.
    while (due := lengths.next_due) < prompt + forced - 1:
        lengths.compact(due)
        lengths.confirm_freed()
        affected.append(due + 1 - prompt)
    return Schedule(tuple(affected), lengths.evicted)


def distances(schedule: Schedule, forced: int) -> np.ndarray:
    """int64 [forced]: predictions since the last compaction, 0 for the first; -1 before any."""
    last = np.full(forced, -1)
    for start in schedule.first_affected:
        last[start:] = start
    return np.where(last < 0, -1, np.arange(forced) - last)


def groups_of(measured: np.ndarray, since: np.ndarray, seed: int) -> list[Group]:
    """Summarises a setting: all tokens, before and after the first compaction, and by distance from the last.

    Args:
        measured: float64 [windows, tokens, MEASURES].
        since: `distances` of the tokens.
        seed: of the bootstrap.
    """
    chosen = {"all": np.ones_like(since, dtype=bool), BEFORE: since < 0, AFTER: since >= 0}
    for first, end in pairwise((*DISTANCES, math.inf)):
        chosen[f"{first}-{end - 1}" if end < math.inf else f"{first}-"] = (since >= first) & (since < end)
    if chosen[BEFORE].all():
        chosen = {"all": chosen["all"]}
    return [_group(name, measured[:, which], seed) for name, which in chosen.items() if which.any()]


def _group(name: str, measured: np.ndarray, seed: int) -> Group:
    kl, top1, full, own = (measured[..., index].mean(axis=1) for index in range(len(MEASURES)))
    loss = figure(full - own, seed)
    return Group(
        name=name,
        tokens=measured.shape[0] * measured.shape[1],
        kl=figure(kl, seed),
        top1=figure(top1, seed),
        loss=loss,
        perplexity_ratio=Figure(
            mean=math.exp(loss.mean),
            low=None if loss.low is None else math.exp(loss.low),
            high=None if loss.high is None else math.exp(loss.high),
        ),
    )


def figure(by_window: np.ndarray, seed: int) -> Figure:
    """The mean of windows of equal size, and the percentile bootstrap's interval for it.

    Windows are drawn, not tokens: tokens of one window depend on each other.
    """
    mean = float(by_window.mean())
    if len(by_window) < 2:
        return Figure(mean=mean, low=None, high=None)
    drawn = np.random.default_rng(seed).integers(len(by_window), size=(RESAMPLES, len(by_window)))
    means = by_window[drawn].mean(axis=1)
    low, high = (float(np.quantile(means, share)) for share in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Figure(mean=mean, low=low, high=high)


def row_of(setting: Setting, planned: Schedule, measured: np.ndarray, seed: int) -> Row:
    """One setting's summary; `measured` is float64 [windows, tokens, MEASURES]."""
    return Row(
        budget=None if setting is None else setting.budget,
        buffer=None if setting is None else setting.buffer,
        policy=None if setting is None else setting.policy,
        compactions=len(planned.first_affected),
        evicted_tokens=planned.evicted_tokens,
        groups=groups_of(measured, distances(planned, measured.shape[1]), seed),
    )


def show(report: Report, console: Console) -> None:
    """Prints the report as tables."""
    own = report.own_text
    written = (
        "" if own is None else f" written by {own.model} (temperature {own.temperature:g}, seed {own.seed})"
    )
    console.print(
        f"{report.model}: {report.windows} windows of {report.prompt_tokens} + {report.forced_tokens} tokens"
        f"{written}; perplexity with the full cache {report.full_perplexity:.3f}",
        highlight=False,
    )
    table = Table("cache", "evicted", "KL before", "KL after", "top-1", "loss", "perplexity")
    for row in report.rows:
        every, before, after = row.groups[0], row.group(BEFORE), row.group(AFTER)
        unchanged = every if after is None else before
        table.add_row(
            _name(row),
            f"{row.evicted_tokens:,}",
            "-" if unchanged is None else f"{unchanged.kl.mean:.1e}",
            "-" if after is None else f"{after.kl.mean:.4f}{_interval(after.kl)}",
            "-" if after is None else f"{100 * after.top1.mean:.1f} %",
            "-" if after is None else f"{after.loss.mean:.4f}",
            f"x {every.perplexity_ratio.mean:.4f}",
        )
    console.print(table)
    console.print(
        "KL and loss: nats a token, before and after the first compaction; 95 % intervals over windows. "
        "Row full is the full cache run again: its KL, and KL before, are rounding.",
        highlight=False,
    )
    groups = (group.name for row in report.rows for group in row.groups)
    names = [name for name in dict.fromkeys(groups) if name not in ("all", BEFORE, AFTER)]
    if not names:
        return
    spread = Table("KL since compaction", *names)
    for row in report.rows:
        found = [row.group(name) for name in names]
        if any(found):
            spread.add_row(_name(row), *("-" if group is None else f"{group.kl.mean:.4f}" for group in found))
    console.print(spread)


def _name(row: Row) -> str:
    return "full" if row.budget is None else f"{row.policy}, {row.budget} + {row.buffer}"


def _interval(figure: Figure) -> str:
    return "" if figure.low is None else f"\n{figure.low:.4f} to {figure.high:.4f}"
