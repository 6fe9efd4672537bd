"""Plots as SVG, by hand: bars and lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 760
OURS, OTHERS, INK, FAINT = "#2a6f97", "#b8bfc6", "#24292f", "#e3e6e9"
COLOURS = ("#2a6f97", "#c1666b", "#4c956c", "#d4a017", "#7d5ba6", "#3a3a3a", "#00a6a6", "#e07a1f", "#8d99ae", "#b5179e")


def bars(title: str, values: Sequence[tuple[str, float, bool]]) -> str:
    """A bar for each: its name, its length, and whether it is ours."""
    longest = max((value for _, value, _ in values), default=1.0)
    parts = []
    for index, (name, value, ours) in enumerate(sorted(values, key=lambda each: each[1])):
        top = 48 + index * 24
        length = max((WIDTH - 300) * value / longest, 1)
        parts.append(_text(220, top + 13, name, "end", bold=ours))
        parts.append(f'<rect x="230" y="{top}" width="{length:.1f}" height="18" fill="{OURS if ours else OTHERS}"/>')
        parts.append(_text(236 + length, top + 13, f"{value:.2f}", bold=ours))
    return _drawing(title, 60 + 24 * len(values), parts)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line for each, both axes logarithmic; names stand at the right end."""
    points = [point for line in series.values() for point in line]
    if not points:
        return _drawing(title, 60, [])
    height, left, right, top = 440, 60, WIDTH - 210, 50
    xs = [math.log10(x) for x, _ in points]
    ys = [math.log10(y) for _, y in points]
    low, high = math.floor(min(ys)), math.ceil(max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - min(xs)) / (max(xs) - min(xs) or 1)
        up = (math.log10(y) - low) / (high - low or 1)
        return left + across * (right - left), height - 40 - up * (height - 40 - top)

    parts = []
    for power in range(low, high + 1):
        _, y = place(1, 10.0**power)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(_text(left - 8, y + 4, f"{10.0**power:g}", "end"))
    parts += [_text(place(x, 10.0**low)[0], height - 20, f"{x:g}", "middle") for x in sorted({x for x, _ in points})]
    ends: list[float] = []
    by_end = sorted(series.items(), key=lambda each: place(*each[1][-1])[1])
    for index, (name, line) in enumerate(by_end):
        colour = COLOURS[index % len(COLOURS)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        ends.append(max(place(*line[-1])[1] + 4, ends[-1] + 15 if ends else 0))
        parts.append(_text(right + 10, ends[-1], name, colour=colour))
    return _drawing(title, height, parts)


def _text(x: float, y: float, text: str, anchor: str = "start", *, bold: bool = False, colour: str = INK) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'


def _drawing(title: str, height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">'
    )
    ground = f'<title>{escape(title)}</title><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    name = f'<text x="16" y="26" font-size="15" fill="{INK}">{escape(title)}</text>'
    return "\n".join([head, ground, name, *parts, "</svg>"]) + "\n"
