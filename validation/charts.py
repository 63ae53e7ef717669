"""Line charts as inline SVG: a logarithmic axis, marked columns, one dash pattern and colour a series.

Colours are CSS classes of the page that holds a chart, so that it follows the page from light to dark and to print.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 860, 310
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 42, 40
COLOURS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 2", "12 4")

SMALLEST = 1e-9
"""What is below, and zero, is drawn here: float32 has no digits left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Attributes:
        name: For the legend.
        points: (x, y) with rising x; a y that is not finite is drawn at the top edge.
        style: Number of its colour and dashes: a name has the same one in every chart of a page.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """What to draw.

    Attributes:
        key: Unique in the page; an id.
        title: Read out in place of the picture.
        x_label: Of the horizontal axis.
        y_label: Of the vertical one.
        series: The lines.
        columns: (x, label) to mark.
        limits: (y, label) to mark.
        ticks: (x, label) of the horizontal axis; chosen here if there are none.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    columns: Sequence[tuple[float, str]] = ()
    limits: Sequence[tuple[float, str]] = ()
    ticks: Sequence[tuple[float, str]] = ()


def thinned(values: Sequence[float], bins: int = 400) -> list[tuple[float, float]]:
    """(position, value) points, at most `bins`: the largest value of each bin, so that no peak is lost."""
    size = max(1, math.ceil(len(values) / bins))
    points = []
    for low in range(0, len(values), size):
        part = values[low : low + size]
        offset = max(range(len(part)), key=lambda index: math.inf if math.isnan(part[index]) else part[index])
        points.append((float(low + offset), part[offset]))
    return points


def draw(chart: Chart) -> str:
    """The chart as an <svg> element."""
    plot = _Plot(chart)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{chart.key}-title">',
        f'<title id="{chart.key}-title">{escape(chart.title)}</title>',
        *plot.grid(),
        *plot.marks(),
        *plot.lines(),
        "</svg>",
        legend(chart.series),
    ]
    return "\n".join(parts)


def legend(lines: Sequence[Series]) -> str:
    """Names beside samples of their lines."""
    items = [
        f'<li><svg class="key" viewBox="0 0 34 10" aria-hidden="true"><line x1="1" y1="5" x2="33" y2="5" '
        f"{_stroke(line.style)}/></svg>{escape(line.name)}</li>"
        for line in lines
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _stroke(style: int) -> str:
    dash = DASHES[style % len(DASHES)]
    # The attribute is for readers that leave a page's styles aside.
    return f'class="line series-{style % COLOURS}" stroke="currentColor"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


class _Plot:
    """Scales of one chart, and what is drawn with them."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        points = [point for series in chart.series for point in series.points]
        xs = [x for x, _ in points] or [0.0, 1.0]
        self.low_x, self.high_x = min(xs), max(max(xs), min(xs) + 1)
        ys = [max(y, SMALLEST) for y in (*(y for _, y in points), *(y for y, _ in chart.limits)) if math.isfinite(y)]
        self.low = math.floor(math.log10(min(ys, default=SMALLEST)))
        self.high = max(math.ceil(math.log10(max(ys, default=1.0)) + 0.1), self.low + 1)

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        exponent = math.log10(max(value, SMALLEST)) if math.isfinite(value) else self.high
        share = (min(max(exponent, self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> list[str]:
        bottom, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
        parts = []
        for exponent in range(self.low, self.high + 1, 1 + (self.high - self.low) // 8):
            y = self.y(10.0**exponent)
            parts.append(_rule("grid", LEFT, y, WIDTH - RIGHT, y))
            parts.append(_text(LEFT - 8, y + 4, f"1e{exponent}" if exponent else "1", anchor="end"))
        for value, label in self.chart.ticks or _ticks(self.low_x, self.high_x):
            parts.append(_text(self.x(value), bottom + 16, label))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.chart.x_label))
        turned = f'transform="rotate(-90 14 {middle})"'
        parts.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{escape(self.chart.y_label)}</text>')
        return parts

    def marks(self) -> list[str]:
        parts = []
        for index, (value, label) in enumerate(self.chart.columns):
            x = self.x(value)
            parts.append(_rule("column", x, TOP, x, HEIGHT - BOTTOM))
            # Two heights in turn, so that neighbours can be read.
            side = "end" if x > WIDTH - 120 else "start"
            parts.append(_text(x + (-3 if side == "end" else 3), TOP - 22 + 16 * (index % 2), label, anchor=side))
        for value, label in self.chart.limits:
            y = self.y(value)
            parts.append(_rule("limit", LEFT, y, WIDTH - RIGHT, y))
            parts.append(_text(WIDTH - RIGHT - 3, y - 4, label, anchor="end"))
        return parts

    def lines(self) -> list[str]:
        parts = []
        for series in self.chart.series:
            points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in series.points)
            parts.append(f'<polyline fill="none" {_stroke(series.style)} points="{points}"/>')
        return parts


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" stroke="currentColor" stroke-opacity="0.3" {ends}/>'


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About eight round numbers."""
    rough = max((high - low) / 8, 1.0)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step) * step
    return [(value, f"{value:,.0f}") for value in (first + step * n for n in range(12)) if value <= high]
