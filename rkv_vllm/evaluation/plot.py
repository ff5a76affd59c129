"""The plot: accuracy against budget and against share of KV, with length and truncation beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rkv_vllm.evaluation.report import Line, lines_of
from rkv_vllm.evaluation.summary import Estimate, Summary

#: Text stays text, and the same rows give the same file.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rkv-vllm",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FULL_STYLE = {"color": "black", "linestyle": "--", "linewidth": 1}

X = Callable[[Line], float]
Y = Callable[[Line], Estimate]


def draw(summaries: Sequence[Summary], path: Path) -> None:
    """Writes the plot as SVG. One curve for each policy, buffer and set of server-wide settings; dashed: the
    full cache of the first run.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = lines_of(summaries)
    full = next((line for line in lines if line.row.budget == "full"), None)
    curves: dict[str, list[Line]] = {}
    for line in lines:
        if line.row.budget != "full":
            curves.setdefault(line.series, []).append(line)

    def budget(line: Line) -> float:
        return float(line.row.budget if line.row.min_budget is None else line.row.min_budget)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        accuracy, by_share, length, truncation = figure.subplots(2, 2).flat
        panels: list[tuple[Any, X, Y, str, str, float]] = [
            (accuracy, budget, _accuracy, "budget, tokens", "right, %", 100),
            (
                by_share,
                _share_of_kv,
                _accuracy,
                "most pages held, % of the full cache's",
                "right, %",
                100,
            ),
            (length, budget, lambda line: line.row.output_tokens, "budget, tokens", "tokens an answer", 1),
            (truncation, budget, lambda line: line.row.truncated, "budget, tokens", "truncated, %", 100),
        ]
        for axes, x, y, x_label, y_label, scale in panels:
            for name, points in curves.items():
                _curve(axes, name, sorted(points, key=x), x, y, scale)
            if full is not None:
                _level(axes, y(full), scale)
            axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None))
            axes.set_ylim(0, 103 if scale == 100 else None)
        figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw_tasks(summaries: Mapping[str, Sequence[Summary]], path: Path) -> None:
    """Writes a plot as SVG with a panel for each task: right answers against the pages that are held."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(summaries), 3.8), layout="constrained")
        axes: Any
        panels = figure.subplots(1, len(summaries), squeeze=False).flat
        for axes, (task, runs) in zip(panels, summaries.items(), strict=True):
            lines = [line for line in lines_of(runs) if not line.server_wide and not line.row.protect]
            for policy in dict.fromkeys(line.row.policy for line in lines if line.row.policy):
                points = [line for line in lines if line.row.policy == policy]
                points.sort(key=lambda line: line.row.share_of_kv)
                _curve(axes, policy, points, _share_of_kv, _accuracy, 100)
            _level(axes, next(line.row.accuracy for line in lines if line.row.budget == "full"), 100)
            axes.set(title=task, xlabel="most pages held, % of the full cache's", ylabel="right, %")
            axes.set(xlim=(0, None), ylim=(0, 103))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _share_of_kv(line: Line) -> float:
    return 100 * line.row.share_of_kv


def _accuracy(line: Line) -> Estimate:
    return line.row.accuracy


def _curve(axes: Any, name: str, points: Sequence[Line], x: X, y: Y, scale: float) -> None:
    estimates = [y(point) for point in points]
    values = [scale * each.value for each in estimates]
    below = [scale * (each.value - each.low) for each in estimates]
    above = [scale * (each.high - each.value) for each in estimates]
    axes.errorbar(
        list(map(x, points)), values, yerr=[below, above], label=name, marker="o", markersize=3, capsize=2
    )


def _level(axes: Any, estimate: Estimate, scale: float) -> None:
    axes.axhline(scale * estimate.value, label="full cache", **FULL_STYLE)
    axes.axhspan(scale * estimate.low, scale * estimate.high, color="black", alpha=0.08, linewidth=0)
