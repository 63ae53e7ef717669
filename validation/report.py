"""The report: one HTML file that loads nothing, with its verdict first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from transom.validation.charts import STYLE, Series, embed, line_plot, thinned
from transom.validation.result import ImagesResult, LengthResult, TargetResult, Validation


def share(value: float) -> str:
    """Of a hundred, or in words if nothing was counted."""
    return "none" if math.isnan(value) else f"{value:.2%}"


def number(value: float) -> str:
    """Two digits, or in words if it is none."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return "0" if value == 0 else f"{value:.1e}"


_PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters |= {"share": share, "number": number}


def page(template: str, title: str, result: object, **values: Any) -> str:
    """A whole page by its template."""
    return _PAGES.get_template(template).render(title=title, result=result, style=STYLE.read_text("utf-8"), **values)


def render(validation: Validation) -> str:
    """A whole page."""
    verdict = "passed" if validation.passed else "failed"
    return page(
        "validation.html",
        f"{validation.model}: validation {verdict}",
        validation,
        verdict=verdict,
        failed=sum(not target.passed for target in validation.targets.values()),
        by_position=_by_position(validation.targets),
        by_layer=_by_layer(validation.targets),
        steps=lambda target: ((tap.name, tap.op, number(tap.max_abs), number(tap.max_rel)) for tap in target.layers),
        facts=_facts,
        runs=_runs,
        image_runs=_image_runs,
        encoded=_encoded,
        cache_bytes=_cache_bytes,
    )


def _by_position(targets: Mapping[str, TargetResult]) -> str:
    longest = max((len(target.by_position) for target in targets.values()), default=0)
    columns: dict[float, str] = {}
    for target in targets.values():
        window = target.window or longest + 1
        for turn in range(1, longest // window + 1):
            columns[float(turn * window)] = f"{turn}W" if turn > 1 else f"window {window}"
        columns |= {float(slots): f"ring of {slots} wraps" for slots in target.slots if slots % window}
    plot = line_plot(
        x_label="position in the longest prompt",
        y_label="difference / largest logit",
        series=[
            Series(name=name, points=thinned(target.by_position), style=index)
            for index, (name, target) in enumerate(targets.items())
        ],
        columns=sorted((x, label) for x, label in columns.items() if x < longest),
        limits=sorted({(target.tolerance.relative, "allowed") for target in targets.values()}),
    )
    return embed(f"Difference by position, {', '.join(targets)}", plot)


def _by_layer(targets: Mapping[str, TargetResult]) -> str:
    """The worst step of each layer; "" if none was measured."""
    series, ticks = [], {}
    for index, (name, target) in enumerate(targets.items()):
        points: dict[float, float] = {}
        layers = [tap.layer for tap in target.layers if tap.layer is not None]
        for tap in target.layers:
            # What comes before the first layer stands left of it, what comes after the last one right of that.
            outside, label = (max(layers, default=0) + 1, "end") if points.keys() - {-1.0} else (-1, "in")
            x = float(outside if tap.layer is None else tap.layer)
            ticks[x] = label if tap.layer is None else str(tap.layer)
            worst = points.get(x, 0.0)
            points[x] = math.nan if math.isnan(worst) or math.isnan(tap.max_rel) else max(worst, tap.max_rel)
        if points:
            series.append(Series(name=name, points=sorted(points.items()), style=index))
    if not series:
        return ""
    plot = line_plot(x_label="layer", y_label="difference / largest value", series=series, ticks=sorted(ticks.items()))
    return embed(f"Difference by layer, {', '.join(line.name for line in series)}", plot)


def _runs(target: TargetResult) -> Iterator[tuple[str, ...]]:
    for run in target.lengths:
        yield (_tokens(run), *_figures(run))


def _image_runs(images: ImagesResult) -> Iterator[tuple[str, ...]]:
    for run in images.runs:
        yield (run.case, _tokens(run), f"{run.step:,}", *_figures(run))


def _encoded(images: ImagesResult) -> Iterator[tuple[str, ...]]:
    for one in images.encoded:
        yield (
            one.image,
            f"{one.pixels_different:,}",
            number(one.max_abs),
            number(one.max_rel),
            f"{one.worst:,}",
            f"{one.seconds:.2f}",
        )


def _tokens(run: LengthResult) -> str:
    return f"{run.length:,}" if run.kind == "prefill" else f"{run.first:,} to {run.length - 1:,}, one by one"


def _figures(run: LengthResult) -> tuple[str, ...]:
    return (
        number(run.max_abs),
        number(run.max_rel),
        f"{run.worst:,}",
        number(run.kl_mean),
        number(run.kl_max),
        f"{run.top1_agreement:.2%}",
        f"{run.seconds:.2f}",
    )


def _cache_bytes(target: TargetResult) -> Iterator[tuple[str, str]]:
    if (caches := target.caches) is not None:
        yield "local layers, as allocated", f"{caches.local:,}"
        yield "local layers, by the manifest", f"{caches.local_manifest:,}"
        yield "local layers, bare windows", f"{caches.local_window:,}"
        yield f"local layers, if they grew to {target.context:,} tokens", f"{caches.unbounded:,}"
        yield "global layers, as allocated", f"{caches.global_:,}"


def _facts(target: TargetResult) -> dict[str, str]:
    facts = {
        "artifact": target.folder or "not kept",
        "quantisation": target.quant,
        "computes in": target.dtype,
        "context": f"{target.context:,} tokens",
        "new tokens in a call": f"at most {target.chunk:,}"
        + ("" if target.window is None else f", with a window of {target.window:,}"),
        "slots of local layers": ", ".join(map(str, target.slots)) or "they grow",
        "greedy continuation": f"{target.new_tokens} tokens, {_divergence(target)}",
    }
    if target.kl_unquantized is not None:
        limit = number(target.kl_unquantized_limit or math.inf)
        facts["mean KL from the unquantised model"] = f"{number(target.kl_unquantized)} nats, {limit} is allowed"
    optional = {"note": target.note, "not reached": "; ".join(target.not_reached)}
    return facts | {name: words for name, words in optional.items() if words}


def _divergence(target: TargetResult) -> str:
    if target.first_different is None:
        return "all of them the oracle's"
    first = f"the first that differs is number {target.first_different}, counted from 0"
    if target.first_divergence == target.first_different:
        return first
    also = "" if target.first_divergence is None else f"; number {target.first_divergence} is none"
    return f"{first}, which is a tie{also}"
