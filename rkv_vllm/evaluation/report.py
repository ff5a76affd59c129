"""Rows of one or several runs as a table, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from rkv_vllm.evaluation.summary import Estimate, Row, Summary
from rkv_vllm.settings.values import AUTO

COLUMNS = (
    *("cache", "buffer", "right %", "95 %", "answers", "truncated %"),
    *("tokens", "evicted", "compacted %", "switched at", "most pages", "KV %"),
)

#: Characters a line; a terminal that has fewer than the table needs wraps its lines.
ENOUGH = 500


@dataclass(frozen=True)
class Line:
    """A row, and what the whole run it is from was started with, where that was set."""

    row: Row
    server_wide: dict[str, Any]

    @property
    def series(self) -> str:
        """What it has in common with the other points of a curve: all but the budget."""
        words = [self.row.policy or "full cache"]
        if self.row.min_budget is not None:
            words.append(AUTO)
        if self.row.buffer is not None:
            words.append(f"buffer {self.row.buffer}")
        words += self._protected
        return ", ".join([*words, *(f"{name} {value}" for name, value in self.server_wide.items())])

    @property
    def _protected(self) -> list[str]:
        protect = self.row.protect
        return [f"protected {'prompt' if protect == 'prompt' else f'first {protect}'}"] if protect else []

    @property
    def cache(self) -> str:
        """Policy and budget, and what the run was started with."""
        row = self.row
        percent = "" if row.budget_percent is None else f" ({row.budget_percent:g} %)"
        budget = row.budget if row.min_budget is None else f"{row.budget}:{row.min_budget}"
        words = [
            "full cache" if row.policy is None else f"{row.policy} {budget}{percent}",
            *self._protected,
        ]
        return ", ".join([*words, *(f"{name} {value}" for name, value in self.server_wide.items())])


def lines_of(summaries: Sequence[Summary]) -> list[Line]:
    return [Line(row, summary.settings.server_wide) for summary in summaries for row in summary.rows]


def cells(line: Line) -> tuple[str, ...]:
    row = line.row
    return (
        line.cache,
        "" if row.buffer is None else str(row.buffer),
        _percent(row.accuracy.value),
        _range(row.accuracy),
        f"{row.answers:,}",
        _percent(row.truncated.value),
        f"{row.output_tokens.value:,.0f}",
        f"{row.evicted_tokens:,.0f}",
        _percent(row.compacted),
        "" if row.full_cache_tokens is None else f"{row.full_cache_tokens:,.0f}",
        f"{row.peak_pages:,.1f}",
        _percent(row.share_of_kv),
    )


def facts(summaries: Sequence[Summary]) -> list[str]:
    """What has to be known to read the table."""
    found = [
        "In each run all rows' requests, those with the full cache among them, ran mixed in one engine.",
        f"Intervals: {summaries[0].interval}.",
        "Truncated answers count as wrong.",
        "Tokens, evicted and most pages are means over answers; KV % is most pages over the full cache's.",
    ]
    if any(row.min_budget is not None for summary in summaries for row in summary.rows):
        found.append(
            "Budget auto is measured under this run's load; its requests switched at the mean length shown."
        )
    for summary in summaries:
        sampling = summary.settings
        how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
        found.append(
            f"{summary.settings.task['name']}: {summary.problems:,} problems, {summary.samples} "
            f"sample{'s' if summary.samples > 1 else ''} each, {how}, seed {sampling.seed}."
        )
    return list(dict.fromkeys(found))


def warnings_of(lines: Sequence[Line]) -> list[str]:
    return [
        f"{line.cache}, buffer {line.row.buffer}: {line.row.warning}" for line in lines if line.row.warning
    ]


def show(summaries: Sequence[Summary], console: Console) -> None:
    lines = lines_of(summaries)
    table = Table(box=SIMPLE)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*cells(line), style="red" if line.row.warning else None)
    needed = Measurement.get(console, console.options.update(max_width=ENOUGH), table).maximum
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width
    for fact in facts(summaries):
        console.print(fact, highlight=False, markup=False)
    for warning in warnings_of(lines):
        console.print(f"WARNING: {warning}", style="bold red", highlight=False, markup=False)


def markdown(summaries: Sequence[Summary]) -> str:
    lines = lines_of(summaries)
    table = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *map(cells, lines)]
    text = ["| " + " | ".join(row) + " |" for row in table]
    notes = [*facts(summaries), *(f"**{warning}**" for warning in warnings_of(lines))]
    return "\n".join([*text, "", *(f"- {note}" for note in notes), ""])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _range(estimate: Estimate) -> str:
    return f"{100 * estimate.low:.1f}-{100 * estimate.high:.1f}"
