"""A run in numbers: one row a setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from rkv_vllm.evaluation import statistics
from rkv_vllm.evaluation.answers import Answer
from rkv_vllm.evaluation.run_file import RunSettings
from rkv_vllm.evaluation.settings import FULL_CACHE, Protect, Setting
from rkv_vllm.settings.values import AUTO

#: A row with a smaller share of compacted answers says little about compaction.
EVIDENCE = 0.2


class Estimate(BaseModel):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, estimate: statistics.Estimate) -> Estimate:
        return cls(**{name: round(number, 5) for name, number in estimate._asdict().items()})


class Row(BaseModel):
    """One setting.

    Attributes:
        min_budget: with budget "auto", what a request keeps once it has switched.
        budget_percent: what the budget, or with "auto" its minimum, was asked as, where it was in percent.
        protect: first tokens that never leave, or `prompt`; 0: none.
        accuracy: share of right answers; truncated ones are wrong.
        truncated: share of answers that the limit on tokens ended.
        output_tokens: mean length of an answer.
        compacted: share of answers with at least one compaction.
        full_cache_tokens: mean length up to which nothing was evicted, over the answers that switched, with
            budget "auto"; None: none did.
        evicted_tokens, compactions, peak_pages: means over answers.
        share_of_kv: mean of the most pages an answer held, over that of the full cache in the same run.
    """

    setting: str
    policy: str | None
    budget: int | Literal["auto", "full"]
    min_budget: int | None = None
    budget_percent: float | None
    buffer: int | None
    protect: Protect = 0
    problems: int
    answers: int
    right: int
    accuracy: Estimate
    truncated: Estimate
    output_tokens: Estimate
    compacted: float
    full_cache_tokens: float | None = None
    compactions: float
    evicted_tokens: float
    peak_pages: float
    share_of_kv: float

    @property
    def warning(self) -> str | None:
        """What keeps the row from saying what it seems to."""
        if self.budget == "full":
            return None
        if not self.evicted_tokens:
            return "this row was NOT compacted: no token was evicted"
        if self.budget == AUTO:
            return None  # how many were compacted is what the load made of it, and a part of the answer
        if self.compacted < EVIDENCE:
            return f"only {100 * self.compacted:.0f} % of the answers were compacted: no evidence"
        return None


class Summary(BaseModel):
    model_config = ConfigDict(extra="forbid")

    commands: list[str]
    settings: RunSettings
    engine: dict[str, Any]
    problems: int
    samples: int
    full_length: float | None
    interval: str = statistics.INTERVAL
    rows: list[Row]
    warnings: list[str]

    @classmethod
    def read(cls, folder: Path) -> Summary:
        """Raises: OSError, ValueError."""
        return cls.model_validate_json((folder / "summary.json").read_text())


def full_length(answers: Sequence[Sequence[Answer]]) -> float:
    """Mean of prompt and output tokens; at least one answer."""
    lengths = [answer.prompt_tokens + answer.output_tokens for each in answers for answer in each]
    return sum(lengths) / len(lengths)


def rows_of(
    settings: Sequence[Setting],
    answers_of: Callable[[Setting], list[list[Answer]]],
) -> list[Row]:
    """
    Args:
        settings: in the order of the rows, the full cache among them.
        answers_of: the answers to a setting, by problem; there is one at least.
    """
    full_pages = statistics.mean(_values(answers_of(FULL_CACHE), lambda answer: answer.peak_pages)).value
    return [_row(setting, answers_of(setting), full_pages) for setting in settings]


def _row(setting: Setting, answers: Sequence[Sequence[Answer]], full_pages: float) -> Row:
    def mean(value: Callable[[Answer], float]) -> float:
        return statistics.mean(_values(answers, value)).value

    right = [[answer.right for answer in each] for each in answers]
    truncated = [[answer.truncated for answer in each] for each in answers]
    lengths = _values(answers, lambda answer: answer.output_tokens)
    is_full = setting == FULL_CACHE
    peak = mean(lambda answer: answer.peak_pages)
    whole = [answer.full_cache_tokens for each in answers for answer in each]
    switched_at = [tokens for tokens in whole if tokens is not None]
    return Row(
        setting=setting.name,
        policy=setting.policy,
        budget="full" if is_full else AUTO if setting.auto else setting.budget,
        min_budget=setting.budget if setting.auto else None,
        budget_percent=setting.percent,
        buffer=None if is_full else setting.buffer,
        protect=setting.protect,
        problems=len(answers),
        answers=sum(map(len, answers)),
        right=sum(map(sum, right)),
        accuracy=Estimate.of(statistics.share(right)),
        truncated=Estimate.of(statistics.share(truncated)),
        output_tokens=Estimate.of(statistics.mean(lengths)),
        compacted=round(mean(lambda answer: answer.compactions > 0), 5),
        full_cache_tokens=round(fmean(switched_at), 3) if switched_at else None,
        compactions=round(mean(lambda answer: answer.compactions), 3),
        evicted_tokens=round(mean(lambda answer: answer.evicted_tokens), 3),
        peak_pages=round(peak, 3),
        share_of_kv=round(peak / full_pages, 5),
    )


def _values(answers: Sequence[Sequence[Answer]], value: Callable[[Answer], float]) -> list[list[float]]:
    return [[value(answer) for answer in each] for each in answers]
