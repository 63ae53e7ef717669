"""The ablation's tables and plot.

Axes: S seeds, P problems.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablation.study import CONTENDERS, cells, run
from benchmarks.ablation.task import Study
from benchmarks.ablation.warm import train_members
from transom.compiler import versions
from transom.validation.evaluation.statistics import Estimate, estimate_runs

ENOUGH_SEEDS = 5
"""With fewer, the report puts no method before another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A contender's figures over its seeds.

    Attributes:
        contender: Its name.
        rate: Its learning rate.
        edge: Whether no higher, or no lower, rate was tried.
        seconds: Of the processor, a run with its reward models.
        prepared: How many of them its reward models took, before the first step.
        seen: Exact match of samples on a thousand of the prompts that it learned from: the reward.
        scores: [S, P] by what was measured, at the end, and `timed` at the seconds of the quickest.
        curve: (step, seconds, sampled exact match), means over the seeds.
    """

    contender: str
    rate: float
    edge: bool
    seconds: float
    prepared: float
    seen: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64]]
    curve: Sequence[tuple[int, float, float]]


def rows(study: Study, folder: Path, seeds: int, start: Sequence[float]) -> list[Row]:
    """Of all runs that are there.

    Args:
        study: Their numbers.
        folder: Where they are.
        seeds: How many at most.
        start: Exact match of the base model's samples, a number a problem.
    """
    runs = {
        name: [run(cell, study, folder) for cell in cells(name, study, folder, seeds) if cell.path(folder).exists()]
        for name in CONTENDERS
    }
    ends = {name: [figures["points"][-1] for figures in done] for name, done in runs.items() if done}
    budget = budget_of({name: [point["seconds"] for point in points] for name, points in ends.items()})
    result = []
    for name, points in ends.items():
        scores = {key: np.array([point[key] for point in points]) for key in ("sampled", "greedy", "kl")}
        scores["timed"] = np.array([sampled_at(budget, figures, start) for figures in runs[name]])
        curve = [
            (
                moment[0]["step"],
                float(np.mean([point["seconds"] for point in moment])),
                float(np.mean([point["sampled"] for point in moment])),
            )
            for moment in zip(*(figures["points"] for figures in runs[name]), strict=True)
        ]
        rate = runs[name][0]["rate"]
        result.append(
            Row(
                contender=name,
                rate=rate,
                edge=rate in (min(study.rates), max(study.rates)),
                seconds=float(np.mean([point["seconds"] for point in points])),
                prepared=float(np.mean([figures["prepared"] for figures in runs[name]])),
                seen=np.array([figures["seen"] for figures in runs[name]]),
                scores=scores,
                curve=curve,
            )
        )
    return result


def sampled_at(seconds: float, figures: Mapping[str, Any], start: Sequence[float]) -> NDArray[np.float64]:
    """Exact match of samples after so many seconds of a run, [P]: on the line between two measurements, or at the end.

    Before its first step a run is at the start, which takes none, or as long as its reward models take.
    """
    points = figures["points"]
    times = [figures["prepared"], *(point["seconds"] for point in points)]
    scores_NP = np.array([start, *(point["sampled"] for point in points)])
    place = float(np.interp(seconds, times, range(len(times))))
    before, share = int(place), place % 1
    after = min(before + 1, len(points))
    result: NDArray[np.float64] = (1 - share) * scores_NP[before] + share * scores_NP[after]
    return result


def budget_of(seconds: Mapping[str, Sequence[float]]) -> float:
    """Seconds that all may use: a run of the quickest that samples, which right answers need not."""
    means = [float(np.mean(values)) for name, values in seconds.items() if CONTENDERS[name].method is not None]
    return min(means, default=float("inf"))


def estimated(scores: NDArray[np.float64]) -> Estimate:
    """A mean over seeds and problems."""
    return estimate_runs(scores, resamples=2000)


def compared(rows: Sequence[Row]) -> dict[str, Estimate]:
    """How far the others are below the one that samples right answers most often, on the same problems and seeds."""
    count = min(len(row.scores["sampled"]) for row in rows)
    best = max(rows, key=lambda row: float(row.scores["sampled"].mean()))
    return {
        row.contender: estimated(row.scores["sampled"][:count] - best.scores["sampled"][:count])
        for row in rows
        if row is not best
    }


def report(study: Study, folder: Path, rows: Sequence[Row], start: Mapping[str, list[float]], out: Path) -> None:
    """Write the files.

    Args:
        study: The numbers.
        folder: Where the runs are.
        rows: Of the table.
        start: What was measured of the base model, a number a problem.
        out: Where to write.
    """
    before = {key: estimated(np.array([scores])) for key, scores in start.items()}
    figures = [
        {
            "contender": row.contender,
            "note": CONTENDERS[row.contender].note,
            "anchor_moves": CONTENDERS[row.contender].moves,
            "seeds": len(row.seen),
            "rate": row.rate,
            "rate_is_at_the_edge": row.edge,
            "seconds": row.seconds,
            "prepared": row.prepared,
            "curve": row.curve,
            **{key: estimated(scores).to_json() for key, scores in {"seen": row.seen, **row.scores}.items()},
        }
        for row in rows
    ]
    differences = {name: estimate.to_json() for name, estimate in compared(rows).items()} if rows else {}
    learned = any(CONTENDERS[row.contender].warm for row in rows)
    result = {
        "study": dataclasses.asdict(study),
        "libraries": versions(["torch", "numpy"]),
        "start": {key: estimate.to_json() for key, estimate in before.items()},
        "reward_models": train_members(study, folder) if learned else None,
        "budget_seconds": budget_of({row.contender: [row.seconds] for row in rows}) if rows else None,
        "rows": figures,
        "below_the_best": differences,
        "missing": [name for name in CONTENDERS if name not in {row.contender for row in rows}],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "ablation.md").write_text(page(result))
    if rows and importlib.util.find_spec("matplotlib"):
        draw(rows, before["sampled"].value, out / "ablation.png")


def page(result: Mapping[str, Any]) -> str:
    """The figures as a page."""
    study, rows = result["study"], result["rows"]
    lines = [
        "# Alignment methods on one small task",
        "",
        "Sums and differences of numbers from 0 to 99; a Gemma 3 of two layers, width 64, 16 characters; one thread;",
        "written by `python -m benchmarks.ablation`. The base model learned answers of which "
        f"{study['wrong']:.0%} were wrong.",
        f"Every method then took {study['steps']} steps of {study['samples']} samples (SFT: right answers), with exact "
        "match as the reward (but for WARM).",
        f"Each learning rate is the best of {', '.join(f'{rate:g}' for rate in study['rates'])}, by one run of "
        f"{study['tuning_steps']} steps, on",
        f"{study['splits']['tuning']:,} problems of their own. Measured on {study['splits']['unseen']:,} distinct "
        "problems that stood in no training;",
        "only `reward` is of prompts that were learned from. In brackets: 95% by the bootstrap over seeds and problems",
        "(of few seeds, so rather too narrow; of one, of problems alone). KL to the base model is in nats an answer.",
        "",
        "| method | seeds | rate | reward | exact, sampled | exact, greedy | KL | sampled, equal time | s a run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| base model | | | | {_share(result['start']['sampled'])} | {_share(result['start']['greedy'])} | 0 | | |",
    ]
    for row in rows:
        kl, edge = row["kl"], "*" if row["rate_is_at_the_edge"] else ""
        lines.append(
            f"| {row['contender']} | {row['seeds']} | {row['rate']:g}{edge} | {_share(row['seen'])} "
            f"| {_share(row['sampled'])} | {_share(row['greedy'])} | {kl['value']:.2f} ({kl['low']:.2f} to "
            f"{kl['high']:.2f}) | {_share(row['timed'])} | {row['seconds']:.0f} |"
        )
    if not rows:
        lines += ["", "No run is complete yet."]
    else:
        lines += [
            "",
            f"Equal time: after {result['budget_seconds']:.1f} s of the processor, a run of the quickest method that "
            "samples, on the line between",
            f"two measurements (one every {study['every']} steps); what ended sooner, at its end. Measuring takes "
            "no part in any seconds.",
        ]
    if models := result["reward_models"]:
        lines += ["", "## Reward models", "", *_reward_models(models)]
    if any(row["rate_is_at_the_edge"] for row in rows):
        lines += ["", "\\* The lowest or the highest that was tried: one beyond might be better."]
    lines += ["", "## Which is better", "", *_verdict(rows, result["below_the_best"])]
    lines += ["", "## Methods", ""]
    for row in rows:
        anchor = f"; the anchor moves by {study['anchor_rate']:g} a step" if row["anchor_moves"] else ""
        lines.append(f"- {row['contender']}: {row['note']}{anchor}.")
    if result["missing"]:
        lines += ["", f"Not run: {', '.join(result['missing'])}."]
    return "\n".join(lines) + "\n"


def _share(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _reward_models(models: Mapping[str, Any]) -> list[str]:
    """In plain words."""
    accuracies = models["accuracy"]
    return [
        f"WARM's reward is the average of {models['members']} reward models. They learned {models['pairs']:,} pairs of "
        "a right and a wrong",
        f"answer, of {models['samples']:,} samples of the base model on the prompts that methods learn from: samples "
        "on top of a",
        f"run's own. All runs share one average, and each is charged with its {models['seconds']:.0f} s. Pairs ranked "
        "right, of",
        f"{accuracies[-1]['pairs']:,} on the problems that stood in no training (the average, on pairs that were "
        f"learned: {models['on_learned_pairs']:.3f}):",
        "",
        *(
            f"- {each['name']}: {each['accuracy']:.3f} ({each['low']:.3f} to {each['high']:.3f})."
            for each in accuracies
        ),
    ]


def _verdict(rows: Sequence[Mapping[str, Any]], below: Mapping[str, Mapping[str, float]]) -> list[str]:
    """In plain words; nothing of few seeds."""
    if len(rows) < 2:
        return ["Fewer than two methods were run."]
    if min(row["seeds"] for row in rows) < ENOUGH_SEEDS:
        return [f"Some methods have fewer than {ENOUGH_SEEDS} seeds: no order can be told."]
    (best,) = {row["contender"] for row in rows} - below.keys()
    lines = [f"{best} samples right answers most often. Differences to it, on the same seeds and problems:", ""]
    for name, difference in sorted(below.items(), key=lambda item: -item[1]["value"]):
        tie = ": a tie" if difference["high"] >= 0 else ""
        lines.append(f"- {name}: {_share(difference)}{tie}.")
    return lines


def draw(rows: Sequence[Row], start: float, path: Path) -> None:
    """Exact match over samples, over seconds, and over KL."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.5), layout="constrained", sharey=True)
    for index, row in enumerate(rows):
        steps, seconds, sampled = zip(*row.curve, strict=True)
        # Colours come again after ten rows, so marks change then.
        style = {"color": f"C{index % 10}", "marker": ".s"[index // 10], "linestyle": ("-", "--")[index // 10]}
        axes[0].plot((0, *steps), (start, *sampled), label=f"{row.contender}, {len(row.seen)} seeds", **style)
        axes[1].plot((row.prepared, *seconds), (start, *sampled), **style)
        axes[2].plot(row.scores["kl"].mean(), row.scores["sampled"].mean(), **{**style, "marker": "os"[index // 10]})
    for axis, title in zip(axes, ("steps", "seconds of the processor", "KL to the base model at the end"), strict=True):
        axis.set(xlabel=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="exact match of samples, unseen problems")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
