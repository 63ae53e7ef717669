"""Plots by matplotlib: files, or parts of a page, whose colours they follow from light to dark and to print.

matplotlib is the extra `plots`. Nothing else imports it, and this file only where a plot is drawn. The same data give
the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transom.errors import PlotError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = Path(__file__).parent / "templates" / "report.css"
"""Styles of a page, and the colours of all plots by name."""

Draw = Callable[["Axes"], None]
"""Draws one plot."""

DASHES = ((0, ()), (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (1, 2)), (0, (12, 4)))
"""Of lines, beside their colours, for readers who do not see these."""

SMALLEST = 1e-9
"""What is below, and zero, is drawn here: float32 has no digits left."""

SPREAD = 4.0
"""From this ratio of largest to smallest on, an axis is logarithmic: or one bad value would hide the others."""

COLOURS: dict[str, str] = dict(re.findall(r"--([\w-]+): *(#\w+)", STYLE.read_text("utf-8").partition("}")[0]))
"""The light colours of a page, #rrggbb by name."""

_WIDTH, _HEIGHT = 9.6, 4.2
"""Inches of one plot."""

_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": COLOURS["faint"],
    "axes.labelcolor": COLOURS["faint"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.facecolor": COLOURS["page"],
    "figure.facecolor": COLOURS["page"],
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "xtick.color": COLOURS["faint"],
    "ytick.color": COLOURS["faint"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Attributes:
        points: (x, y) with rising x; a y that is not finite is drawn at the top edge.
        style: Number of its colour and dashes: a name has the same one in every plot of a page.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One scheme.

    Attributes:
        name: Written beside it.
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


def check_installed() -> None:
    """Raise `PlotError` without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError(f"plots need matplotlib ({error}): pip install 'transom[plots]'") from None


def write(draws: Sequence[Draw], kind: Literal["svg", "png"], title: str) -> bytes:
    """Plots under each other, as the content of a file.

    Raises:
        PlotError: If matplotlib is not installed.
    """
    check_installed()
    import matplotlib
    from matplotlib.figure import Figure

    height, gap = _HEIGHT * len(draws), 0.65
    # Whatever a user's own settings say, plots look as the report does.
    with matplotlib.rc_context(matplotlib.rcParamsDefault | _SETTINGS | {"svg.hashsalt": title}):
        figure = Figure(figsize=(_WIDTH, height), dpi=150)
        panels = figure.subplots(len(draws), squeeze=False)[:, 0]
        figure.subplots_adjust(0.085, gap / height, 0.985, 1 - gap / height, hspace=2 * gap / (_HEIGHT - 2 * gap))
        for draw, axes in zip(draws, panels, strict=True):
            draw(axes)
        # Without a date and the version of a library, the same data give the same bytes.
        absent = ("Creator", "Date", "Format", "Type") if kind == "svg" else ("Software",)
        content = io.BytesIO()
        figure.savefig(content, format=kind, metadata={"Title": title, **dict.fromkeys(absent)})
    return content.getvalue()


def embed(title: str, draw: Draw) -> str:
    """One plot as an <svg> element of a page; without matplotlib, a line that says how to get it."""
    try:
        svg = write([draw], "svg", title).decode()
    except PlotError as error:
        return f"<p>Not drawn: {escape(str(error))}</p>"
    svg = re.sub(r'^.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, flags=re.DOTALL)
    # A file's own: its style would be for all of the page, and ids that nothing refers to are in every file.
    svg = re.sub(r'<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL)
    names = {colour: name for name, colour in COLOURS.items()}
    return re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", svg)


def line_plot(
    *,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    columns: Sequence[tuple[float, str]] = (),
    limits: Sequence[tuple[float, str]] = (),
    ticks: Sequence[tuple[float, str]] = (),
) -> Draw:
    """Lines over a logarithmic axis; `columns` (x, label) and `limits` (y, label) are marked."""
    heights = [*(y for line in series for _, y in line.points), *(y for y, _ in limits)]
    heights = [max(y, SMALLEST) for y in heights if math.isfinite(y)]
    low = 10.0 ** math.floor(math.log10(min(heights, default=SMALLEST)))
    high = 10.0 ** math.ceil(math.log10(max(heights, default=1.0)) + 0.1)

    def draw(axes: Axes) -> None:
        axes.set(xlabel=x_label, ylabel=y_label, yscale="log", ylim=(low, high))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", color=COLOURS["rule"])
        for line in series:
            heights = [max(y, SMALLEST) if math.isfinite(y) else high for _, y in line.points]
            look: Any = {"color": _colour(line.style), "linestyle": DASHES[line.style % len(DASHES)]}
            axes.plot([x for x, _ in line.points], heights, label=line.name, **look)
        axes.margins(x=0.01)
        for index, (x, label) in enumerate(columns):
            axes.axvline(x, color=COLOURS["faint"], linewidth=0.8, linestyle=(0, (3, 3)))
            # Two heights in turn, so that neighbours can be read.
            _note(axes, label, (x, 1), ("data", "axes fraction"), (2, 3 + 11 * (index % 2)))
        for y, label in limits:
            axes.axhline(y, color=COLOURS["limit"], linewidth=1.0)
            _note(axes, label, (1, y), ("axes fraction", "data"), (-3, 3), ha="right")
        if ticks:
            axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
        if series:
            axes.legend(loc="upper right", bbox_to_anchor=(1, -0.14), ncols=len(series), handlelength=3.5)

    return draw


def scatter_plot(
    *,
    title: str,
    x_label: str,
    better: Literal["less", "more"],
    points: Sequence[Point],
    level: tuple[float, str],
    legend: Sequence[tuple[str, int]] = (),
) -> Draw:
    """Perplexity against a cost, with the front that no other point beats; points without a number are left out.

    `level` is (y, label) of a line across, `legend` (name, style) of the colours if there is more than one.
    """
    points = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]

    def draw(axes: Axes) -> None:
        front = sorted((p.x, p.y) for p in points if p.on_front)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=COLOURS["text"])
        axes.set(xlabel=f"{x_label}, " + ("← better" if better == "less" else "better →"))
        axes.set(ylabel="← better, perplexity")
        axes.grid(color=COLOURS["rule"])
        axes.margins(0.1)
        for name, style in legend:
            axes.plot([], [], "o", color=_colour(style), label=name)
        # Nothing between two schemes can be had, so the front goes in steps.
        steps: Any = "steps-post" if better == "less" else "steps-pre"
        axes.plot([x for x, _ in front], [y for _, y in front], drawstyle=steps, color=COLOURS["faint"], linewidth=1.0)
        for point in points:
            colour = _colour(point.style)
            axes.plot(point.x, point.y, "o", color=colour, mfc=colour if point.on_front else COLOURS["page"])
        if math.isfinite(level[0]):
            axes.axhline(level[0], color=COLOURS["limit"], linewidth=0.8, linestyle=(0, (6, 3)))
        _scale(axes, "x", [point.x for point in points])
        _scale(axes, "y", [*(point.y for point in points), level[0]])
        # Bars that a wild perplexity makes long must not decide the scale.
        axes.autoscale_view()
        axes.autoscale(False)
        for point in points:
            if math.isfinite(point.error) and point.error > 0:
                axes.errorbar(point.x, point.y, point.error, color=_colour(point.style), capsize=3, linewidth=1.0)
        if math.isfinite(level[0]):
            _note(axes, level[1], (0.99, level[0]), ("axes fraction", "data"), (0, 3), ha="right")
        _label(axes, points)
        if legend:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(legend))

    return draw


def thinned(values: Sequence[float], bins: int = 400) -> list[tuple[float, float]]:
    """(position, value) points, at most `bins`: the largest value of each bin, so that no peak is lost."""
    size = max(1, math.ceil(len(values) / bins))
    points = []
    for low in range(0, len(values), size):
        part = values[low : low + size]
        offset = max(range(len(part)), key=lambda index: math.inf if math.isnan(part[index]) else part[index])
        points.append((float(low + offset), part[offset]))
    return points


def _scale(axes: Axes, name: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic, if its values differ so much; the numbers beside it are plain ones."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis, finite = getattr(axes, f"{name}axis"), [value for value in values if math.isfinite(value)] or [1.0]
    if min(finite) > 0 and max(finite) / min(finite) >= SPREAD:
        axes.set(**{f"{name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=12))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _note(axes: Axes, text: str, xy: tuple[float, float], coordinates: Any, offset: Any, **look: Any) -> Any:
    """Write beside a place, so many points off."""
    return axes.annotate(text, xy, offset, xycoords=coordinates, textcoords="offset points", **look)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write every name beside its point, at the first place where no other text and no point stands."""
    marks = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [text.get_window_extent() for text in axes.texts]
    places = [(side, down) for down in (9, -9, 20, -20, 32, -32, 44, -44) for side in ("left", "right")]
    for point in points:
        for side, down in places:
            offset, look = (6 if side == "left" else -6, down), {"ha": side, "va": "center", "color": COLOURS["text"]}
            text = _note(axes, point.name, (point.x, point.y), "data", offset, **look)
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in taken) and not any(box.contains(x, y) for x, y in marks)
            if (free and axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)) or (side, down) == places[-1]:
                taken.append(box)
                break
            text.remove()


def _colour(style: int) -> str:
    return COLOURS[f"series-{style % len(DASHES)}"]
