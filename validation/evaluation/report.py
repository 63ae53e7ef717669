"""The report of an evaluation: a table and two plots, in one HTML file that loads nothing, or the plots alone."""

from __future__ import annotations

import math
from typing import Literal

from transom.validation.charts import Draw, Point, embed, scatter_plot, write
from transom.validation.evaluation.contest import WIN_RATE, Contest
from transom.validation.evaluation.result import Axis, Evaluation, Row
from transom.validation.evaluation.statistics import Estimate
from transom.validation.report import number, page, share

HEADER = (
    "scheme", "MB", "B/weight", "perplexity", "loss difference", "KL", "top-1", "prefill", "decode", "front",
)  # fmt: skip


def render(evaluation: Evaluation) -> str:
    """A whole page."""
    return page(
        "evaluation.html",
        f"{evaluation.model}: schemes",
        evaluation,
        header=HEADER,
        rows=[cells(evaluation, row) for row in evaluation.rows],
        positions=position_table(evaluation),
        plots=[embed(title, draw) for title, draw in plots(evaluation).items()],
    )


def render_plot(evaluation: Evaluation, kind: Literal["svg", "png"]) -> bytes:
    """Both plots as one file.

    Raises:
        PlotError: If matplotlib is not installed.
    """
    return write(list(plots(evaluation).values()), kind, f"{evaluation.model}: schemes")


CONTEST_HEADER = ("measure", "artifact", "mean", "difference")


def render_contest(contest: Contest) -> str:
    """A whole page of artifacts beside each other."""
    title = f"{contest.file}: {contest.kind}"
    return page("contest.html", title, contest, header=CONTEST_HEADER, rows=contest_rows(contest))


def contest_rows(contest: Contest) -> list[tuple[str, ...]]:
    """Rows of the table under `CONTEST_HEADER`, as plain text, measure by measure."""
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for each in contest.contenders for name in (*each.measures, *each.differences)):
        for each in contest.contenders:
            # A win rate is against the first contender already.
            mean, difference = each.measures.get(name), each.differences.get(name)
            if name == WIN_RATE:
                mean, difference = difference, None
            if mean is not None:
                rows.append((name, each.name, _interval(mean), _interval(difference, "+")))
    return rows


def _interval(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def cells(evaluation: Evaluation, row: Row) -> tuple[str, ...]:
    """A row of the table under `HEADER`, as plain text."""
    bare = row is evaluation.plain
    return (
        row.name,
        f"{row.bytes / 1e6:,.1f}",
        f"{row.bytes_per_weight:.3f}",
        f"{figures(row.perplexity)} ± {figures(row.perplexity_error)}",
        "" if bare else f"{row.loss_difference.mean:+.4f} ± {row.loss_difference.error:.4f}",
        "" if bare else number(row.kl.mean),
        "" if bare else share(row.top1_agreement),
        *("" if speed is None else f"{speed:,.{0 if speed >= 100 else 1}f}" for speed in (row.prefill, row.decode)),
        ", ".join({"bytes": "size", "decode": "speed"}[axis] for axis in evaluation.fronts_of(row)),
    )


def position_table(evaluation: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of perplexity by position, as plain text; no rows where one bucket holds all."""
    titles = tuple(bucket.title for bucket in evaluation.plain.by_position)
    if len(titles) < 2:
        return ("scheme", *titles), []
    rows = [(row.name, *(figures(bucket.perplexity) for bucket in row.by_position)) for row in evaluation.rows]
    return ("scheme", *titles), rows


def figures(value: float) -> str:
    """Three decimals, which perplexities of good models differ in; of a bad one, none."""
    return f"{value:,.{3 if value < 100 else 0}f}"


def plots(evaluation: Evaluation) -> dict[str, Draw]:
    """Bytes and speed against perplexity, by title."""
    size, speed = f"{evaluation.model}: perplexity by size", f"{evaluation.model}: perplexity by speed"
    return {
        size: _plot(evaluation, size, "bytes", "MB on disk", "less"),
        speed: _plot(evaluation, speed, "decode", "tokens decoded a second", "more"),
    }


def points(evaluation: Evaluation, axis: Axis) -> list[Point]:
    """What stands in a plot."""
    targets, on_front = _targets(evaluation), evaluation.front(axis)
    return [
        Point(
            # The legend tells the target; what is left tells artifacts of one scheme apart.
            name=row.name.removeprefix(f"{row.target} "),
            x=row.bytes / 1e6 if axis == "bytes" else row.decode or math.nan,
            y=row.perplexity,
            error=row.perplexity * row.loss_difference.error,
            style=targets.index(row.target),
            on_front=row in on_front,
        )
        for row in evaluation.measured
    ]


def _plot(evaluation: Evaluation, title: str, axis: Axis, x_label: str, better: Literal["less", "more"]) -> Draw:
    targets, plain = _targets(evaluation), evaluation.plain.perplexity
    return scatter_plot(
        title=title,
        x_label=x_label,
        better=better,
        points=points(evaluation, axis),
        level=(plain, f"unquantised, plain module: {figures(plain)}"),
        legend=[(name, style) for style, name in enumerate(targets)] if len(targets) > 1 else (),
    )


def _targets(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(row.target for row in evaluation.measured))
