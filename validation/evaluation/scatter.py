"""Scatter plots as SVG: a point a scheme, and the front that no other scheme beats.

Colours are CSS classes, so that a plot follows a page from light to dark; `document` makes a file of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Literal

from transom.validation.charts import COLOURS
from transom.validation.evaluation.axis import Axis
from transom.validation.report import CHART_STYLE, STYLE

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 78, 20, 44, 46
RADIUS = 5.0
LETTER, LINE = 6.9, 14.0
"""Rough size of a letter of the labels, to keep them apart."""

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One scheme.

    Attributes:
        name: Written beside it.
        x: Its cost.
        y: Its perplexity.
        error: Length of the bar to each side of `y`.
        style: Number of its colour.
        on_front: Whether it is filled, and the line of the front goes through it.
    """

    name: str
    x: float
    y: float
    error: float
    style: int
    on_front: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scatter:
    """What to draw.

    Attributes:
        key: Unique in the page; an id.
        title: Above the plot.
        x_label: Of the horizontal axis.
        y_label: Of the vertical one.
        better: Which way costs get better along the horizontal axis; the vertical one gets better downwards.
        points: What is drawn; those with a number that is not finite are left out.
        level: (y, label) of a line across.
        legend: (name, style) of the colours, if there is more than one.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    better: Literal["less", "more"]
    points: Sequence[Point]
    level: tuple[float, str]
    legend: Sequence[tuple[str, int]] = ()


def draw(scatter: Scatter) -> str:
    """The plot as an <svg> element of a page."""
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{scatter.key}-title">',
            f'<title id="{scatter.key}-title">{escape(scatter.title)}</title>',
            *_Plot(scatter).parts(),
            "</svg>",
        ]
    )


def document(title: str, scatters: Sequence[Scatter]) -> str:
    """Plots under each other as a file of its own, in the light colours of the report."""
    # Not every program that shows SVG knows CSS variables.
    colours = dict(re.findall(r"(--[\w-]+): *(#\w+)", STYLE.read_text(encoding="utf-8").partition("}")[0]))
    style = re.sub(r"var\((--[\w-]+)\)", lambda match: str(colours[match[1]]), CHART_STYLE.read_text(encoding="utf-8"))
    high = HEIGHT * len(scatters)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" width="{WIDTH}" height="{high}">',
            f"<title>{escape(title)}</title><style>{style}</style>",
            f'<rect class="paper" fill="white" width="{WIDTH}" height="{high}"/>',
            *(
                f'<g transform="translate(0 {index * HEIGHT})">{"".join(_Plot(scatter).parts())}</g>'
                for index, scatter in enumerate(scatters)
            ),
            "</svg>\n",
        ]
    )


class _Plot:
    """Scales of one plot, and what is drawn with them."""

    def __init__(self, scatter: Scatter) -> None:
        self.scatter = scatter
        self.points = [point for point in scatter.points if math.isfinite(point.x) and math.isfinite(point.y)]
        self.level = scatter.level if math.isfinite(scatter.level[0]) else None
        self.x_axis = Axis.of([point.x for point in self.points])
        levels = [] if self.level is None else [self.level[0]]
        # Bars that a wild perplexity makes long must not decide the scale.
        bars = [point.y + side * point.error for point in self.points for side in (-1, 1) if point.error < point.y / 2]
        self.y_axis = Axis.of([*levels, *bars, *(point.y for point in self.points)])

    def parts(self) -> list[str]:
        return [*self._grid(), *self._across(), *self._front(), *self._marks(), *self._names(), *self._legend()]

    def x(self, value: float) -> float:
        return LEFT + self.x_axis.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y_axis.share(value) * (HEIGHT - TOP - BOTTOM)

    def _grid(self) -> list[str]:
        scatter, bottom, middle = self.scatter, HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
        parts = [_text(LEFT, 20, scatter.title, anchor="start", kind="heading")]
        for value, label in self.y_axis.ticks():
            parts.append(_rule("grid", LEFT, self.y(value), WIDTH - RIGHT, self.y(value)))
            parts.append(_text(LEFT - 8, self.y(value) + 4, label, anchor="end"))
        for value, label in self.x_axis.ticks():
            parts.append(_rule("grid", self.x(value), TOP, self.x(value), bottom))
            parts.append(_text(self.x(value), bottom + 16, label))
        better = "← better" if scatter.better == "less" else "better →"
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, f"{scatter.x_label}, {better}"))
        turned = f'transform="rotate(-90 14 {middle})"'
        parts.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>← better, {scatter.y_label}</text>')
        return parts

    def _across(self) -> list[str]:
        if self.level is None:
            return []
        y = self.y(self.level[0])
        return [_rule("limit", LEFT, y, WIDTH - RIGHT, y, dash="6 3")]

    def _corners(self) -> list[tuple[float, float]]:
        """Of the front's steps: nothing between two schemes can be had."""
        on_front = sorted((point for point in self.points if point.on_front), key=lambda point: (point.x, point.y))
        corners: list[tuple[float, float]] = []
        for point in on_front:
            x, y = self.x(point.x), self.y(point.y)
            if corners:
                corners.append((x, corners[-1][1]) if self.scatter.better == "less" else (corners[-1][0], y))
            corners.append((x, y))
        return corners

    def _front(self) -> list[str]:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in self._corners())
        return [f'<polyline class="line" fill="none" stroke="currentColor" stroke-opacity="0.5" points="{path}"/>']

    def _marks(self) -> list[str]:
        parts = []
        for point in self.points:
            x, y = self.x(point.x), self.y(point.y)
            kind = f"series-{point.style % COLOURS}"
            if ends := self._bar(point):
                bar = f"M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" + "".join(f"M{x - 4:.1f} {end:.1f}h8" for end in ends)
                parts.append(f'<path class="{kind}" fill="none" stroke="currentColor" d="{bar}"/>')
            fill = 'fill="currentColor"' if point.on_front else 'class="paper" fill="white"'
            parts.append(
                f'<g class="{kind}"><circle {fill} stroke="currentColor" stroke-width="1.6" cx="{x:.1f}" '
                f'cy="{y:.1f}" r="{RADIUS}"/></g>'
            )
        return parts

    def _bar(self, point: Point) -> tuple[float, float] | None:
        """Upper and lower end of a point's bar."""
        if not (math.isfinite(point.error) and point.error > 0):
            return None
        return self._clamped(point.y + point.error), self._clamped(point.y - point.error)

    def _clamped(self, value: float) -> float:
        if self.y_axis.logarithmic and value <= self.y_axis.low:
            return HEIGHT - BOTTOM
        return min(max(self.y(value), TOP), HEIGHT - BOTTOM)

    def _names(self) -> list[str]:
        """Names beside their points, where nothing else is."""
        taken, parts = self._taken(), []
        if self.level is not None:
            label, y = self.level[1], self.y(self.level[0])
            spots = [
                (x, y + dy, anchor)
                for dy in (-5, 13)
                for x, anchor in ((WIDTH - RIGHT - 4, "end"), (LEFT + 4, "start"), ((LEFT + WIDTH) / 2, "middle"))
            ]
            parts.append(_placed(label, spots, taken))
            taken.append((LEFT, y - 1, WIDTH - RIGHT, y + 1))
        for point in self.points:
            x, y = self.x(point.x), self.y(point.y)
            far = RADIUS + 4
            spots = [
                (x + far, y + 4, "start"),
                (x - far, y + 4, "end"),
                (x + far, y - far, "start"),
                (x - far, y - far, "end"),
                (x + far, y + far + 8, "start"),
                (x - far, y + far + 8, "end"),
                (x, y - far - 4, "middle"),
                (x, y + far + 12, "middle"),
                *((x + far, y + down * LINE, "start") for down in (2, -2, 3, -3, 4, -4)),
                *((x - far, y + down * LINE, "end") for down in (2, -2, 3, -3, 4, -4)),
            ]
            parts.append(_placed(point.name, spots, taken, kind="name"))
        return parts

    def _taken(self) -> list[Box]:
        """Where points, their bars and the front are."""
        centres = [(self.x(point.x), self.y(point.y)) for point in self.points]
        boxes = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in centres]
        for point in self.points:
            if ends := self._bar(point):
                boxes.append((self.x(point.x) - 4, ends[0], self.x(point.x) + 4, ends[1]))
        for (x1, y1), (x2, y2) in itertools.pairwise(self._corners()):
            boxes.append((min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1))
        return boxes

    def _legend(self) -> list[str]:
        parts, x = [], float(WIDTH - RIGHT)
        for name, style in reversed(self.scatter.legend):
            parts.append(_text(x, 20, name, anchor="end"))
            x -= len(name) * LETTER + 10
            parts.append(
                f'<circle class="series-{style % COLOURS}" fill="currentColor" cx="{x:.1f}" cy="16" r="{RADIUS}"/>'
            )
            x -= 18
        return parts


def _placed(text: str, spots: Sequence[tuple[float, float, str]], taken: list[Box], kind: str = "") -> str:
    """The text at the first spot that is free and inside the plot, or at the first of all."""

    def box(spot: tuple[float, float, str]) -> Box:
        (x, y, anchor), wide = spot, len(text) * LETTER
        low = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        return (low, y - LINE + 3, low + wide, y + 3)

    def free(area: Box) -> bool:
        inside = area[0] >= LEFT and area[2] <= WIDTH - RIGHT and area[1] >= TOP - 8 and area[3] <= HEIGHT - BOTTOM
        return inside and not any(
            area[0] < other[2] and other[0] < area[2] and area[1] < other[3] and other[1] < area[3] for other in taken
        )

    spot = next((spot for spot in spots if free(box(spot))), spots[0])
    taken.append(box(spot))
    return _text(spot[0], spot[1], text, anchor=spot[2], kind=kind)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float, *, dash: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line class="{kind}" stroke="currentColor" stroke-opacity="0.3"{dashes} {ends}/>'
