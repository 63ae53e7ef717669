"""The report: one HTML file that loads nothing, with its verdict first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from transom.validation.charts import STYLE, Series, embed, line_plot, thinned
from transom.validation.result import TargetResult, Validation

if TYPE_CHECKING:
    from transom.validation.evaluation.result import Evaluation


def render(validation: Validation) -> str:
    """A whole page."""
    verdict, mark = ("passed", "✓") if validation.passed else ("failed", "✗")
    prompt = validation.prompt
    ran, wrong = len(validation.targets), sum(not result.passed for result in validation.targets.values())
    count = f"{ran} target{'s' if ran != 1 else ''} ran, " + (f"{wrong} failed" if wrong else "none failed")
    body = [
        f'<header class="{verdict}"><h1>{escape(validation.model)}</h1>',
        f'<p class="verdict"><span aria-hidden="true">{mark}</span> Validation {verdict}</p>',
        f"<p>{count}. Held against {escape(validation.oracle)}.</p></header>",
        "<main>",
        *_failures(validation),
        "<section><h2>Targets</h2>",
        _summary(validation),
        not_run(validation.not_run),
        "</section>",
        *_positions(validation),
        *_layers(validation),
        *(_details(name, result) for name, result in validation.targets.items()),
        provenance(
            validation, {"prompt": f"{prompt['tokens']:,} tokens of {prompt['source']}, sha256 {prompt['sha256']}"}
        ),
        "</main>",
    ]
    return page(f"{validation.model}: validation {verdict}", body)


def page(title: str, body: Iterable[str]) -> str:
    """A whole page that loads nothing; the body is HTML already."""
    style = STYLE.read_text(encoding="utf-8")
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
    )
    return "\n".join([head, *body, "</body></html>\n"])


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the rows; cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def not_run(reasons: Mapping[str, str]) -> str:
    """What was left out, and why."""
    lines = [f"<li><strong>{escape(name)}</strong>: {escape(why)}</li>" for name, why in reasons.items()]
    return f"<h3>Not run</h3><ul>{''.join(lines)}</ul>" if lines else ""


def provenance(result: Validation | Evaluation, facts: Mapping[str, str], *, weights: str = "") -> str:
    """The last section: weights, the facts given, date and versions."""
    facts = {
        "weights": f"{result.source['name']}, revision {result.source['revision']}{weights}",
        **facts,
        "date": result.date,
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }
    lines = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f"<section><h2>Where this comes from</h2><dl>{lines}</dl></section>"


def _failures(validation: Validation) -> list[str]:
    lines = [
        f"<li><strong>{escape(name)}</strong>: {escape(failure)}</li>"
        for name, result in validation.targets.items()
        for failure in result.failures
    ]
    return [f'<section class="failures"><h2>What is wrong</h2><ul>{"".join(lines)}</ul></section>'] if lines else []


def _summary(validation: Validation) -> str:
    header = (
        "target", "verdict", "max abs", "max rel", "KL mean", "KL max", "top-1", "first divergence", "local caches",
        "seconds",
    )  # fmt: skip
    rows = [
        (
            escape(name),
            f'<span class="{"pass" if result.passed else "fail"}">{"pass" if result.passed else "fail"}</span>',
            number(result.worst("max_abs")),
            number(result.worst("max_rel")),
            number(result.worst("kl_mean")),
            number(result.worst("kl_max")),
            share(result.top1_agreement),
            "none" if result.first_divergence is None else f"token {result.first_divergence}",
            f"{result.caches.local:,} B" if result.caches else "none",
            f"{result.seconds:.1f}",
        )
        for name, result in validation.targets.items()
    ]
    return table("Largest values over all lengths. KL is in nats, the relative difference of the largest logit of its "
                 "position.", header, rows)  # fmt: skip


def _positions(validation: Validation) -> list[str]:
    results = validation.targets
    longest = max((len(result.by_position) for result in results.values()), default=0)
    columns: dict[float, str] = {}
    for result in results.values():
        window = result.window or longest + 1
        for turn in range(1, longest // window + 1):
            columns[float(turn * window)] = f"{turn}W" if turn > 1 else f"window {window}"
        for slots in result.slots:
            if slots < longest and slots % window:
                columns[float(slots)] = f"ring of {slots} wraps"
    plot = line_plot(
        x_label="position in the longest prompt",
        y_label="difference / largest logit",
        series=[
            Series(name=name, points=thinned(result.by_position), style=index)
            for index, (name, result) in enumerate(results.items())
        ],
        columns=sorted((x, label) for x, label in columns.items() if x < longest),
        limits=sorted({(result.tolerance.relative, "allowed") for result in results.values()}),
    )
    title = f"Difference by position, {', '.join(results)}"
    return [
        "<section><h2>Difference by position</h2>",
        "<p>The largest difference of any logit, as a share of the largest logit of its position. What rounding makes "
        "is level; a wrong window or a wrong slot makes a step at a marked position.</p>",
        f"<figure>{embed(title, plot)}</figure></section>",
    ]


def _layers(validation: Validation) -> list[str]:
    measured = {name: result for name, result in validation.targets.items() if result.layers}
    if not measured:
        return []
    series, ticks = [], {}
    for name, result in measured.items():
        points: dict[float, float] = {}
        last = max((tap.layer for tap in result.layers if tap.layer is not None), default=0)
        seen = False
        for tap in result.layers:
            seen = seen or tap.layer is not None
            x = float(tap.layer if tap.layer is not None else (last + 1 if seen else -1))
            points[x] = _largest((points.get(x, 0.0), tap.max_rel))
            ticks[x] = str(tap.layer) if tap.layer is not None else ("end" if seen else "in")
        series.append(Series(name=name, points=sorted(points.items()), style=list(validation.targets).index(name)))
    plot = line_plot(
        x_label="layer",
        y_label="difference / largest value",
        series=series,
        ticks=sorted(ticks.items()),
    )
    title = f"Difference by layer, {', '.join(measured)}"
    return [
        "<section><h2>Difference by layer</h2>",
        "<p>Intermediate values of a prompt of three windows, against the reference's, each as a share of the largest "
        "value there; the worst step of each layer.</p>",
        f"<figure>{embed(title, plot)}</figure>",
        *(_steps(name, result) for name, result in measured.items()),
        "</section>",
    ]


def _steps(name: str, result: TargetResult) -> str:
    rows = [(escape(tap.name), tap.op, number(tap.max_abs), number(tap.max_rel)) for tap in result.layers]
    listed = table(f"Every step of {name}", ("step", "operation", "max abs", "max rel"), rows)
    return f"<details><summary>Show every step of {escape(name)}</summary>{listed}</details>"


def _largest(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _details(name: str, result: TargetResult) -> str:
    runs = [
        (
            f"{run.length:,}" if run.kind == "prefill" else f"{run.first:,} to {run.length - 1:,}, one by one",
            number(run.max_abs),
            number(run.max_rel),
            f"{run.worst:,}",
            number(run.kl_mean),
            number(run.kl_max),
            f"{run.top1_agreement:.2%}",
            f"{run.seconds:.2f}",
        )
        for run in result.lengths
    ]
    header = ("tokens", "max abs", "max rel", "at position", "KL mean", "KL max", "top-1", "seconds")
    caches, bound = result.caches, result.tolerance
    sizes = (
        []
        if caches is None
        else [
            ("local layers, as allocated", f"{caches.local:,}"),
            ("local layers, by the manifest", f"{caches.local_manifest:,}"),
            ("local layers, bare windows", f"{caches.local_window:,}"),
            (f"local layers, if they grew to {result.context:,} tokens", f"{caches.unbounded:,}"),
            ("global layers, as allocated", f"{caches.global_:,}"),
        ]
    )
    facts = [
        ("artifact", escape(result.folder or "not kept")),
        ("quantisation", escape(result.quant)),
        ("computes in", escape(result.dtype)),
        ("context", f"{result.context:,} tokens"),
        (
            "new tokens in a call",
            f"at most {result.chunk:,}" + ("" if result.window is None else f", with a window of {result.window:,}"),
        ),
        ("slots of local layers", ", ".join(map(str, result.slots)) or "they grow"),
        ("greedy continuation", f"{result.new_tokens} tokens, " + _divergence(result)),
    ]
    if result.kl_unquantized is not None:
        limit = number(result.kl_unquantized_limit or math.inf)
        facts.append(
            ("mean KL from the unquantised model", f"{number(result.kl_unquantized)} nats, {limit} is allowed")
        )
    if result.note:
        facts.append(("note", escape(result.note)))
    if result.not_reached:
        facts.append(("not reached", escape("; ".join(result.not_reached))))
    sensitive = ""
    if bound.outliers:
        sensitive = f" ({number(bound.outlier * bound.relative)} at {bound.outliers:.1%} of the positions)"
    allowed = (
        f"Allowed: {number(bound.relative)} of the largest logit{sensitive}, {number(bound.kl_mean)} nats on average "
        f"and {number(bound.kl_max)} at one position, top-1 agreement {bound.top1:.0%}, a tie of {number(bound.tie)}. "
        f"Reason: {bound.reason}."
    )
    return "\n".join(
        [
            f"<section><h2>{escape(name)}</h2>",
            "<dl>" + "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts) + "</dl>",
            table("Runs, each from empty caches", header, runs),
            table("Cache bytes", ("what", "bytes"), sizes),
            f"<p>{escape(allowed)}</p></section>",
        ]
    )


def _divergence(result: TargetResult) -> str:
    if result.first_different is None:
        return "all of them the oracle's"
    first = f"the first that differs is number {result.first_different}, counted from 0"
    if result.first_divergence == result.first_different:
        return first
    also = "" if result.first_divergence is None else f"; number {result.first_divergence} is none"
    return f"{first}, which is a tie{also}"


def share(value: float) -> str:
    """Of a hundred, or in words if nothing was counted."""
    return "none" if math.isnan(value) else f"{value:.2%}"


def number(value: float) -> str:
    """Two digits, or in words if it is none."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return "0" if value == 0 else f"{value:.1e}"
