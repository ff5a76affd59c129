"""Plots of what was measured, as SVG files; needs matplotlib (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rkv_vllm.bench.report import Comparison, compare
from rkv_vllm.bench.results import Results
from rkv_vllm.bench.rows import Kind

COLOURS: dict[Kind, str] = {"stock": "#7a7a7a", "off": "#3b6fb6", "rkv": "#c8501e"}
LABELS: dict[Kind, str] = {"stock": "stock vLLM", "off": "R-KV in place, switched off", "rkv": "R-KV"}
MARKERS: dict[Kind, str] = {"stock": "o", "off": "s", "rkv": "^"}
CLASS_COLOURS = (
    "#c8501e",
    "#3b6fb6",
    "#7a7a7a",
    "#5a9367",
    "#b39437",
    "#7d5ba6",
    "#4aa3a2",
    "#a05050",
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
    for title, result in results:
        written.append(_pool(result, title, folder))
    return [path for path in written if path is not None]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return path


def _throughput(comparisons: Sequence[Comparison], folder: Path) -> Path | None:
    """Tokens/s against running requests, a point a row and engine, with all windows' range."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for kind in LABELS:
        found = [(each.sides[kind], each.row.name) for each in comparisons if kind in each.sides]
        # Rows that are one load to stock share its figures, and one point.
        points = {(side.running, side.tokens_per_second): (side, name) for side, name in reversed(found)}
        sides = [points[place] for place in sorted(points)]
        if not sides:
            continue
        speeds = [side.tokens_per_second for side, _ in sides]
        low = [side.tokens_per_second - side.slowest for side, _ in sides]
        high = [side.fastest - side.tokens_per_second for side, _ in sides]
        axes.errorbar(
            [side.running for side, _ in sides],
            speeds,
            yerr=[low, high],
            fmt=MARKERS[kind],
            color=COLOURS[kind],
            label=LABELS[kind],
            capsize=2,
        )
        for side, name in sides:
            axes.annotate(
                name,
                (side.running, side.tokens_per_second),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=6,
            )
    if not axes.has_data():
        plt.close(figure)
        return None
    axes.set(xlabel="running requests", ylabel="output tokens/s", xscale="log", yscale="log")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    return _save(figure, folder / "throughput.svg")


def _lengths(comparisons: Sequence[Comparison], folder: Path) -> Path | None:
    """Time of a step against the length of its requests, of the rows whose requests are all about as old."""
    import matplotlib.pyplot as plt

    of_an_age = [each for each in comparisons if each.row.ages is not None]
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
            axes.plot(lengths, times, marker=MARKERS[kind], color=COLOURS[kind], label=LABELS[kind])
    axes.set(xlabel="tokens of a request so far", ylabel="milliseconds a step", xscale="log")
    axes.set_ylim(bottom=0)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    return _save(figure, folder / "length.svg")


def _pool(results: Results, title: str, folder: Path) -> Path | None:
    """Pool use and running requests over time, a row of axes a load, of each kind's first life."""
    import matplotlib.pyplot as plt

    rows = results.group.rows
    figure, axes = plt.subplots(len(rows), 2, figsize=(8.0, 2.0 * len(rows)), squeeze=False)
    seen = set()
    for life in results.lives:
        if life.kind in seen:
            continue
        seen.add(life.kind)
        curves = {load.row: load.curve for load in life.loads}
        for place, row in enumerate(rows):
            points = curves.get(row.name, [])
            seconds = [point.seconds for point in points]
            axes[place, 0].plot(
                seconds,
                [100 * point.pool_use for point in points],
                color=COLOURS[life.kind],
                label=LABELS[life.kind],
            )
            axes[place, 1].plot(seconds, [point.running for point in points], color=COLOURS[life.kind])
    for place, row in enumerate(rows):
        axes[place, 0].set(ylabel="pool in use, %", title=row.name, ylim=(0, 105))
        axes[place, 1].set(ylabel="running requests")
    for each in axes[-1]:
        each.set_xlabel("seconds since the load began")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    return _save(figure, folder / f"pool-{title}.svg")


def _split(comparisons: Sequence[Comparison], folder: Path) -> Path | None:
    """Time of a step, split: by kernels where a profile was taken, else into compaction and all else."""
    import matplotlib.pyplot as plt

    bars = [
        (f"{each.row.name}\n{LABELS[kind]}", _parts(side))
        for each in comparisons
        for kind, side in each.sides.items()
    ]
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
