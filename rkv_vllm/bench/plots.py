"""Plots of what was measured, as SVG files; needs matplotlib (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from rkv_vllm.bench.report import Comparison, Side, compare, each_side_once
from rkv_vllm.bench.results import Results
from rkv_vllm.bench.rows import Kind, Row
from rkv_vllm.bench.window import Point

COLOURS: dict[Kind, str] = {
    "stock": "#7a7a7a",
    "stock-fp8": "#2b2b2b",
    "off": "#3b6fb6",
    "rkv": "#c8501e",
    "rkv-fp8": "#7d5ba6",
    "auto": "#5a9367",
}
LABELS: dict[Kind, str] = {
    "stock": "stock vLLM",
    "stock-fp8": "stock vLLM, FP8 cache",
    "off": "R-KV in place, switched off",
    "rkv": "R-KV",
    "rkv-fp8": "R-KV, FP8 cache",
    "auto": "R-KV once memory is short",
}
MARKERS = ("o", "^", "s", "D", "v", "P")
CLASS_COLOURS = (
    "#c8501e",
    "#3b6fb6",
    "#7a7a7a",
    "#5a9367",
    "#b39437",
    "#7d5ba6",
    "#4aa3a2",
    "#a05050",
    "#2b2b2b",
    "#cccccc",
)


def plot(results: Sequence[tuple[str, Results]], folder: Path) -> list[Path]:
    """Writes all plots there is data for.

    Args:
        results: with a title each.

    Returns: the files.

    Raises: ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rkv-vllm", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = [each for title, result in results for each in compare(result, title)]
    written = [_throughput(comparisons, folder), _split(comparisons, folder), _lengths(comparisons, folder)]
    written.append(_ramp(comparisons, folder))
    for title, result in results:
        written.append(_pool(result, title, folder))
    return [path for path in written if path is not None]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return path


def _throughput(comparisons: Sequence[Comparison], folder: Path) -> Path | None:
    """Tokens/s against running requests, a point a row and engine, with all windows' range.

    Rows that differ in how many requests run, and in nothing else, are joined by a line.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    lines: dict[tuple[Kind, str], dict[float, Side]] = {}
    for row, side in each_side_once(comparisons):
        if row.ages is None:
            lines.setdefault((side.kind, _load_of(row, side.kind)), {})[side.running] = side
    places = dict.fromkeys(LABELS, 0)
    for kind, load in sorted(lines, key=lambda key: list(LABELS).index(key[0])):
        sides = [side for _, side in sorted(lines[kind, load].items())]
        axes.errorbar(
            [side.running for side in sides],
            [side.tokens_per_second for side in sides],
            yerr=[
                [side.tokens_per_second - side.slowest for side in sides],
                [side.fastest - side.tokens_per_second for side in sides],
            ],
            fmt=f"-{MARKERS[places[kind] % len(MARKERS)]}",
            color=COLOURS[kind],
            label=f"{LABELS[kind]}: {load}",
            capsize=2,
        )
        places[kind] += 1
    if not lines:
        plt.close(figure)
        return None
    axes.set(xlabel="running requests", ylabel="output tokens/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=7)
    return _save(figure, folder / "throughput.svg")


def _load_of(row: Row, kind: Kind) -> str:
    """What a request is, to an engine of this kind."""
    load = f"{row.output:,} tokens out"
    budget = row.budget_for(kind)
    return load if budget is None else f"{load}, budget {budget.budget:,} + {budget.buffer:,}"


def _lengths(comparisons: Sequence[Comparison], folder: Path) -> Path | None:
    """Time of a step against the length of its requests, of rows that differ in their requests' age alone."""
    import matplotlib.pyplot as plt

    alike: dict[Row, list[Comparison]] = {}
    for each in comparisons:
        if each.row.ages is not None:
            alike.setdefault(each.row.model_copy(update={"name": "", "ages": None}), []).append(each)
    of_an_age = max(alike.values(), key=len, default=[])
    if len(of_an_age) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for kind in LABELS:
        points = sorted(
            (each.row.input + fmean(each.row.age_range), each.sides[kind].step_milliseconds)
            for each in of_an_age
            if kind in each.sides
        )
        if points:
            lengths, times = zip(*points, strict=True)
            axes.plot(lengths, times, marker=MARKERS[0], color=COLOURS[kind], label=LABELS[kind])
    axes.set(xlabel="tokens of a request so far", ylabel="milliseconds a step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.25)
    axes.legend()
    return _save(figure, folder / "length.svg")


def _ramp(comparisons: Sequence[Comparison], folder: Path) -> Path | None:
    """Tokens/s, kept share and the slowest tokens, in the order of rows that go on from one another."""
    import matplotlib.pyplot as plt

    if not any(each.row.goes_on for each in comparisons):
        return None
    figure, panels = plt.subplots(1, 3, figsize=(11.0, 3.4))
    for kind in LABELS:
        sides = [(place, each.sides[kind]) for place, each in enumerate(comparisons) if kind in each.sides]
        if not sides:
            continue
        for axes, values in zip(panels, zip(*(of_ramp(side) for _, side in sides), strict=True), strict=True):
            style = {"marker": MARKERS[0], "color": COLOURS[kind], "label": LABELS[kind]}
            axes.plot([place for place, _ in sides], values, **style)
    titles = ("output tokens/s", "tokens kept, %", "99 of 100 tokens came within, ms")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="requests in flight")
        axes.set_xticks(range(len(comparisons)), [str(each.row.concurrency) for each in comparisons])
        axes.set_ylim(bottom=0)
        axes.grid(True, alpha=0.25)
    figure.tight_layout()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels))
    return _save(figure, folder / "ramp.svg")


def of_ramp(side: Side) -> tuple[float, float, float]:
    """Tokens/s, percent of the tokens that are kept, milliseconds in which 99 of 100 tokens came."""
    # What requests keep of a text that they came without says nothing.
    kept = None if side.entry == "compacted" else side.kept_share
    return (
        side.tokens_per_second,
        nan if kept is None else 100 * kept,
        nan if side.token_p99 is None else 1000 * side.token_p99,
    )


def _pool(results: Results, title: str, folder: Path) -> Path | None:
    """Pool use and running requests over time, a row of axes a load, of each kind's longest run of it."""
    import matplotlib.pyplot as plt

    longest: dict[str, dict[Kind, list[Point]]] = {}
    for run in results.runs:
        for load in run.loads:
            of_row = longest.setdefault(load.row, {})
            of_row[run.kind] = max(of_row.get(run.kind, []), load.curve, key=_seconds)
    rows = [row.name for row in results.group.rows if any(longest.get(row.name, {}).values())]
    if not rows:
        return None
    figure, axes = plt.subplots(len(rows), 2, figsize=(8.0, 2.0 * len(rows)), squeeze=False)
    for name, (pool, running) in zip(rows, axes, strict=True):
        for kind, points in longest[name].items():
            seconds = [point.seconds for point in points]
            style = {"color": COLOURS[kind], "label": LABELS[kind]}
            pool.plot(seconds, [100 * point.pool_use for point in points], **style)
            running.plot(seconds, [point.running for point in points], **style)
        pool.set(ylabel="pool in use, %", title=name, ylim=(0, 105))
        running.set(ylabel="running requests")
        running.set_ylim(bottom=0)
    for each in axes[-1]:
        each.set_xlabel("seconds since the load began")
    lines = {line.get_label(): line for pool in axes[:, 0] for line in pool.get_lines()}
    figure.tight_layout()
    figure.legend(
        handles=list(lines.values()), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines)
    )
    return _save(figure, folder / f"pool-{title}.svg")


def _seconds(points: Sequence[Point]) -> float:
    return points[-1].seconds if points else 0.0


def _split(comparisons: Sequence[Comparison], folder: Path) -> Path | None:
    """Time of a step, split: by kernels where a profile was taken, else into compaction and all else."""
    import matplotlib.pyplot as plt

    bars = [(f"{row.name}\n{LABELS[side.kind]}", _parts(side)) for row, side in each_side_once(comparisons)]
    if not bars:
        return None
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    figure, axes = plt.subplots(figsize=(7.0, 0.42 * len(bars) + 1.0))
    places = range(len(bars))
    left = [0.0] * len(bars)
    for index, name in enumerate(names):
        widths = [parts.get(name, 0.0) for _, parts in bars]
        axes.barh(places, widths, left=left, label=name, color=CLASS_COLOURS[index % len(CLASS_COLOURS)])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, [label for label, _ in bars], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.legend(fontsize=7)
    return _save(figure, folder / "step.svg")


def _parts(side: Any) -> dict[str, float]:
    if side.kernel_time is None:
        rest = side.step_milliseconds - side.compaction_milliseconds
        return {"compaction": side.compaction_milliseconds, "forward and all else": rest}
    spent = side.kernel_time
    return {**spent.classes, "GPU idle": spent.idle}
