"""From measurements to tables and a plot. No speed is shown without the perplexity that it was reached at."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.contenders import BASELINE
from benchmarks.quiet import QUIET

Part = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Timing:
    """One prompt read, and some tokens decoded after it.

    Attributes:
        prefill: Seconds of the whole prompt.
        decode: Seconds of one token.
        other_cpu: CPUs that anything else kept busy meanwhile; None if not known.
    """

    prefill: float
    decode: float
    other_cpu: float | None = None

    @property
    def quiet(self) -> bool:
        """Whether it counts."""
        return self.other_cpu is None or self.other_cpu < QUIET


@dataclasses.dataclass(kw_only=True)
class Row:
    """What was measured of one contender.

    Attributes:
        name: Of the contender.
        description: Version and settings.
        note: Why it did not take part.
        skipped: Why a length was left out, by length.
        load_seconds: Up to the first token.
        timings: By length of the prompt, one a round, the same round for all; disturbed ones are kept, and not used.
        weight_bytes: Of the model's files.
        peak_rss_bytes: Most memory at once while speed was measured.
        cache_bytes: As allocated after the longest prompt.
        log_likelihoods: Of every token of the text, in nats.
    """

    name: str
    description: str = ""
    note: str = ""
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    load_seconds: list[float] = dataclasses.field(default_factory=list)
    timings: dict[int, list[Timing]] = dataclasses.field(default_factory=dict)
    weight_bytes: int | None = None
    peak_rss_bytes: int | None = None
    cache_bytes: int | None = None
    log_likelihoods: list[float] = dataclasses.field(default_factory=list)

    @property
    def perplexity(self) -> float | None:
        """exp(-mean log likelihood)."""
        return math.exp(-statistics.fmean(self.log_likelihoods)) if self.log_likelihoods else None

    def to_json(self) -> dict[str, Any]:
        """All of it, with the perplexity in place of the likelihoods."""
        fields = dataclasses.asdict(self)
        del fields["log_likelihoods"]
        return fields | {"perplexity": self.perplexity}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """One run.

    Attributes:
        facts: Machine, versions, protocol: a label and a sentence each.
        lengths: Tokens of the prompts.
        rows: One a contender.
    """

    facts: dict[str, str]
    lengths: list[int]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """What goes to results.json."""
        return {"facts": self.facts, "lengths": self.lengths, "contenders": [row.to_json() for row in self.rows]}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, least and most of some numbers."""

    median: float
    least: float
    most: float


def speed_ratio(ours: Sequence[Timing], baseline: Sequence[Timing], part: Part) -> Spread | None:
    """How many times as fast as the baseline, round by round where both were quiet; None if there is no such round."""
    rounds = [(a, b) for a, b in zip(ours, baseline, strict=False) if a.quiet and b.quiet]
    ratios = [getattr(theirs, part) / getattr(mine, part) for mine, theirs in rounds]
    return Spread(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def median_seconds(timings: Sequence[Timing], part: Part) -> float | None:
    """Of the quiet ones; None if there are none."""
    seconds = [getattr(timing, part) for timing in timings if timing.quiet]
    return statistics.median(seconds) if seconds else None


def disturbance(rows: Sequence[Row]) -> str:
    """What the report says of quiet; a warning if any timing was lost."""
    timings = [timing for row in rows for some in row.timings.values() for timing in some]
    known = [timing.other_cpu for timing in timings if timing.other_cpu is not None]
    lost = sum(not timing.quiet for timing in timings)
    if not known:
        return "Not known whether anything else used the CPUs."
    busy = f"anything else, idle contenders included, kept {statistics.median(known):.2f} CPUs busy (median)"
    if lost:
        return (
            f"**Warning: {lost} of {len(timings)} timings were disturbed and do not count ({QUIET} CPUs is the limit): "
            f"{busy}, {max(known):.2f} at most. Run this again on a quiet machine.**"
        )
    return f"No timing was disturbed: {busy}, {max(known):.2f} at most."


def perplexity_change(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """Perplexity over theirs, minus one, and its standard error, from the differences token by token."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return None
    differences = [b - a for a, b in zip(ours, theirs, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    return ratio - 1, ratio * statistics.stdev(differences) / math.sqrt(len(differences))


def render(results: Results) -> str:
    """The report as Markdown."""
    baseline = next((row for row in results.rows if row.name == BASELINE), Row(name=BASELINE))
    running = [row for row in results.rows if not row.note]
    lines = [
        "# Benchmarks",
        "",
        disturbance(results.rows),
        "",
        *(f"- {label}: {fact}" for label, fact in results.facts.items()),
        "",
    ]
    lines += ["## Quality and cost", "", *_table(_COST_HEADER, [_cost_cells(row, baseline) for row in running])]
    for title, part in _TITLES.items():
        header = ["contender", "perplexity", *(f"{length:,}" for length in results.lengths)]
        cells = [
            [row.name, _number(row.perplexity), *(_speed(row, baseline, part, n) for n in results.lengths)]
            for row in running
        ]
        lines += ["", f"## {title}", "", *_table(header, cells)]
    lines += [
        "",
        f"In brackets: times the speed of {BASELINE} in the same undisturbed round, median (least to most).",
        "",
    ]
    lines += ["## Contenders", "", *(f"- {row.name}: {row.note or row.description}" for row in results.rows)]
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """Bars of prefill and decode speed, the perplexity in every label."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    running = [row for row in results.rows if not row.note]
    for axis, (title, part) in zip(axes, _TITLES.items(), strict=True):
        for place, row in enumerate(running):
            heights = [_tokens_per_second(row, part, length) or 0 for length in results.lengths]
            at = [group + (place - (len(running) - 1) / 2) * 0.8 / len(running) for group in range(len(heights))]
            label = f"{row.name}: perplexity {_number(row.perplexity)}"
            bars = axis.bar(at, heights, 0.75 / len(running), label=label)
            axis.bar_label(
                bars,
                fmt=lambda height: f"{height:.3g}" if 0 < height < 100 else f"{height:.0f}" if height else "",
                fontsize=7,
            )
        axis.set(title=title)
        axis.set_xticks(range(len(results.lengths)), [f"{length:,}" for length in results.lengths])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


_TITLES: dict[str, Part] = {
    "Prefill, tokens/s by prompt length": "prefill",
    "Decode, tokens/s by tokens before": "decode",
}
_COST_HEADER = ["contender", "perplexity", f"against {BASELINE}", "files", "load", "peak memory", "caches"]


def _cost_cells(row: Row, baseline: Row) -> list[str]:
    change = perplexity_change(row.log_likelihoods, baseline.log_likelihoods) if row is not baseline else None
    return [
        row.name,
        _number(row.perplexity),
        f"{change[0]:+.2%} ± {change[1]:.2%}" if change else "",
        _megabytes(row.weight_bytes),
        f"{statistics.median(row.load_seconds):.2f} s" if row.load_seconds else "",
        _megabytes(row.peak_rss_bytes),
        _megabytes(row.cache_bytes),
    ]


def _speed(row: Row, baseline: Row, part: Part, length: int) -> str:
    if length in row.skipped:
        return row.skipped[length]
    speed = _tokens_per_second(row, part, length)
    if speed is None:
        return "disturbed" if length in row.timings else ""
    ratio = speed_ratio(row.timings[length], baseline.timings.get(length, []), part) if row is not baseline else None
    suffix = f" ({ratio.median:.2f}x, {ratio.least:.2f} to {ratio.most:.2f})" if ratio else ""
    return f"{speed:,.0f}{suffix}" if speed >= 100 else f"{speed:.1f}{suffix}"


def _tokens_per_second(row: Row, part: Part, length: int) -> float | None:
    seconds = median_seconds(row.timings.get(length, []), part)
    return None if seconds is None else (length if part == "prefill" else 1) / seconds


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f} MB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
