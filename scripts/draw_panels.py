"""Draws a dashboard's data as one SVG: a small chart for each panel, with its range and legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLUMNS = 3
WIDTH, HEIGHT, GAP = 380, 190, 16
TOP, PLOT, LEFT = 34, 96, 12
LEGEND_LINES = 3
COLOURS = ("#3274d9", "#e0752d", "#37872d", "#8f3bb8", "#c4162a", "#1f9e9e", "#806b00", "#6e7681")


@dataclass(frozen=True)
class Line:
    """One series: (seconds, value) in order of time."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Drawing:
    """One panel."""

    title: str
    unit: str
    lines: Sequence[Line]


def draw(title: str, panels: Sequence[Drawing]) -> str:
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + GAP) + GAP + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#f4f5f5"/>',
        f'<text x="{GAP}" y="26" font-size="18">{escape(title)}</text>',
    ]
    times = [time for panel in panels for line in panel.lines for time, _ in line.points]
    begin, end = min(times, default=0.0), max(times, default=1.0)
    for index, panel in enumerate(panels):
        x = GAP + index % COLUMNS * (WIDTH + GAP)
        y = 40 + index // COLUMNS * (HEIGHT + GAP)
        parts.append(f'<g transform="translate({x},{y})">{_panel(panel, begin, end)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Drawing, begin: float, end: float) -> str:
    highest = max((value for line in panel.lines for _, value in line.points), default=0.0)
    scale = highest or 1.0
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white" stroke="#d8d9da"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{escape(panel.title)}</text>',
        f'<text x="{WIDTH - LEFT}" y="{TOP - 4}" font-size="10" text-anchor="end" fill="#555">'
        f"up to {_number(highest, panel.unit)}</text>",
    ]
    shown = sorted(panel.lines, key=lambda line: -max(value for _, value in line.points))[: len(COLOURS)]
    for colour, line in zip(COLOURS, shown, strict=False):
        points = " ".join(
            f"{LEFT + (time - begin) / max(end - begin, 1) * (WIDTH - 2 * LEFT):.1f},"
            f"{TOP + PLOT * (1 - max(value, 0) / scale):.1f}"
            for time, value in line.points
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for place, (colour, line) in enumerate(zip(COLOURS, shown[:LEGEND_LINES], strict=False)):
        text = f"{line.name}: {_number(line.points[-1][1], panel.unit)} at the end"
        y = TOP + PLOT + 18 + 14 * place
        parts.append(f'<text x="{LEFT}" y="{y}" font-size="10" fill="{colour}">{escape(text)}</text>')
    return "".join(parts)


def _number(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.1%}"
    if unit == "bytes":
        return f"{value / (1 << 20):.1f} MiB"
    return f"{value:.3g} s" if unit == "s" else f"{value:.4g}"
