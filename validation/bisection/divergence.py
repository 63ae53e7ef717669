"""Compare recorded taps in the order of execution, and find out why the first one differs.

Needs no runtime: recordings may come from anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.runtime import Float
from transom.errors import ArtifactError
from transom.validation.bisection.attention import masks
from transom.validation.bisection.context import LOGITS, Context, Site
from transom.validation.bisection.mutations import hypotheses
from transom.validation.bisection.recording import Recording, positions_of
from transom.validation.bisection.replay import Hypothesis, Replay
from transom.validation.bisection.verdict import Verdict

UNEXPLAINED = 0.1
"""A cause is accepted if it leaves at most this share of the difference unexplained."""

EXACT = 1e-5
"""Predictions this close are all as good as each other: the simplest cause, which stands first, is taken."""

Side = Literal["a", "b"]

Runs = Iterable[tuple[Mapping[str, Float], Mapping[str, Float]]]
"""Taps by name of two runs that go side by side, call by call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two runs are apart at one tap, [rows] each; infinite where a value is not a number."""

    tap: str
    absolute: NDArray[np.float64]
    relative: NDArray[np.float64]

    @staticmethod
    def between(tap: str, a: Float, b: Float) -> Difference:
        """Compare two values [rows, ...]; a row is judged by its own largest value.

        Raises:
            ArtifactError: If their shapes differ.
        """
        if a.shape != b.shape:
            raise ArtifactError(f"{tap} is {a.shape} in one run and {b.shape} in the other: compare runs of one model")
        flat_a, flat_b = (value.reshape(len(value), -1).astype(np.float64) for value in (a, b))
        with np.errstate(invalid="ignore"):
            absolute = np.abs(flat_a - flat_b)
        # Infinities of one sign are equal, and their difference is not a number.
        absolute = np.nan_to_num(np.where(flat_a == flat_b, 0, absolute), nan=np.inf, posinf=np.inf).max(1)
        size = np.nan_to_num(np.maximum(np.abs(flat_a), np.abs(flat_b)), nan=0, posinf=0).max(1)
        # Sums that cancel leave small values with the noise of large ones.
        size = np.maximum(size, 0.1 * np.median(size))
        return Difference(tap=tap, absolute=absolute, relative=absolute / np.maximum(size, np.finfo(np.float32).tiny))

    @staticmethod
    def join(parts: Sequence[Difference]) -> Difference:
        """The same tap over several calls."""
        return Difference(
            tap=parts[0].tap,
            absolute=np.concatenate([part.absolute for part in parts]),
            relative=np.concatenate([part.relative for part in parts]),
        )


def differences(runs: Runs) -> list[Difference]:
    """Compare two runs; only numbers about the differences are kept.

    Taps that only one of the runs has are left out.

    Raises:
        ArtifactError: If the runs have no tap in common, or one of them has another shape.
    """
    parts: dict[str, list[Difference]] = {}
    for a, b in runs:
        for name, value in a.items():
            if name in b:
                parts.setdefault(name, []).append(Difference.between(name, value, b[name]))
    if not parts:
        raise ArtifactError("the two runs have no tap in common: compare runs of one model")
    return [Difference.join(tap_parts) for tap_parts in parts.values()]


def first_divergent(tap_differences: Sequence[Difference], tolerance: float) -> Difference | None:
    """The first tap, in order of execution, that differs: all before it agree, so its inputs do."""
    return next((difference for difference in tap_differences if difference.relative.max() > tolerance), None)


def compare(a: Recording, b: Recording, context: Context) -> Verdict:
    """Find the first site where two recordings of one plan differ, and the cause that reproduces it on the graph.

    Raises:
        ArtifactError: If the runs are not of the same calls, or have no tap in common.
    """
    if a.calls != b.calls:
        raise ArtifactError("the two runs were not made of the same calls: record both with one plan")
    # What the graph does not have has no place in it.
    known_a, known_b = ({name: run.values[name] for name in run.values if name in context.taps} for run in (a, b))
    return compare_runs([(known_a, known_b)], context, lambda taps: (a, b))


def compare_runs(
    runs: Runs, context: Context, recordings: Callable[[set[str]], tuple[Recording, Recording]]
) -> Verdict:
    """Like `compare`; `recordings` gives some taps of both, if they part."""
    tap_differences = differences(runs)
    first = first_divergent(tap_differences, context.tolerance)
    if first is not None:
        where = context.site(first.tap)
        verdict = _explain(where, first, *recordings({first.tap, *where.inputs.values()}), context)
        return dataclasses.replace(verdict, entry=context.graph.task, compared=len(tap_differences))
    results = [difference for difference in tap_differences if difference.tap == context.result]
    bare = (
        f", but without taps only {context.result_words} were compared" if len(results) == len(tap_differences) else ""
    )
    return Verdict(
        diverged=False,
        entry=context.graph.task,
        max_abs=max((float(difference.absolute.max()) for difference in results), default=0.0),
        relative=max(float(difference.relative.max()) for difference in tap_differences),
        cause=f"no value differs beyond the tolerance{bare}",
        compared=len(tap_differences),
        tolerance=context.tolerance,
    )


def _explain(where: Site, difference: Difference, a: Recording, b: Recording, context: Context) -> Verdict:
    """Test every known cause on the numbers of the first site that differs."""
    broken = int((~np.isfinite(difference.absolute)).sum())
    share = _largest(difference.relative)
    differs = difference.relative > context.tolerance
    side, tried = _test(where, {"a": a, "b": b}, differs, context)
    # Of an encoder, some taps have fewer positions than others.
    every = positions_of(where.tap.name, a.calls)[: len(differs)]
    positions = every[differs]
    longest = max((mask.reach for mask in masks(context).values() if mask.reach), default=None)
    pattern = describe_positions(positions, every, a.calls, longest)
    accepted = [trial for trial in tried if trial.error < UNEXPLAINED * share]
    if accepted:
        best = min(accepted, key=lambda trial: (not trial.everywhere, max(trial.error, EXACT)))
        op, cause = best.hypothesis.op or where.op, best.hypothesis.cause
        cause = cause if best.everywhere else f"{cause}, but {pattern}"
    else:
        op = where.op if where.op != "softmax" or len(positions) > 0.9 * len(differs) else "mask"
        cause = f"none of {len(tried)} known causes reproduces the difference, which shows {pattern}"
    if broken:
        cause += f"; {broken} positions hold values that are no numbers"
    ranked = sorted(tried, key=lambda trial: trial.error)[:5]
    return Verdict(
        diverged=True,
        layer=where.tap.layer,
        op=op,
        max_abs=None if broken else float(difference.absolute.max()),
        relative=None if broken else share,
        cause=cause,
        tap=where.tap.name,
        side=side,
        position=int(positions.min()),
        positions=len(positions),
        hypotheses=tuple((trial.hypothesis.cause, trial.error) for trial in ranked if np.isfinite(trial.error)),
        tolerance=context.tolerance,
    )


def _largest(values: NDArray[np.float64]) -> float:
    """The largest finite number; where there is none, the largest that a float32 can be."""
    finite = values[np.isfinite(values) & (values > 0)]
    return float(finite.max(initial=0.0)) or float(np.finfo(np.float32).max)


class _Trial(NamedTuple):
    hypothesis: Hypothesis
    error: float
    """Largest error of the prediction, as a share, at the rows that differ."""
    everywhere: bool
    """Whether the prediction is right at the other rows too."""


def _test(
    where: Site, runs: Mapping[Side, Recording], differs: NDArray[np.bool_], context: Context
) -> tuple[Side | None, list[_Trial]]:
    """Which run is at fault, and how well every hypothesis predicts its numbers."""
    # A site whose inputs were not recorded cannot be run again.
    recorded = {side: run for side, run in runs.items() if {*where.inputs.values()} <= {*run.values}}
    replays = {side: _replay(where, run, context) for side, run in recorded.items()}
    if not replays:
        return None, []
    candidates = {side: hypotheses(replay) for side, replay in replays.items()}
    errors = {side: _errors(next(candidates[side]), replay, differs)[0] for side, replay in replays.items()}
    side = max(replays, key=lambda name: (errors[name], name))
    blamed = side if len(replays) > 1 and errors[side] > 5 * min(errors.values()) else None
    trials = []
    for hypothesis in candidates[side]:
        error, elsewhere = _errors(hypothesis, replays[side], differs)
        trials.append(_Trial(hypothesis, error, elsewhere <= 2 * context.tolerance))
    return blamed, trials


def _errors(hypothesis: Hypothesis, replay: Replay, differs: NDArray[np.bool_]) -> tuple[float, float]:
    """Largest error of a prediction where the runs differ, and elsewhere."""
    predicted = hypothesis.predict(replay).numpy()
    relative = Difference.between(replay.site.tap.name, replay.output.numpy(), predicted).relative
    # A token that sees no key at all may give anything.
    defined = np.isfinite(predicted).reshape(len(predicted), -1).all(1)
    if not (differs & defined).any():
        return np.inf, np.inf
    return float(relative[differs & defined].max()), float(relative[~differs & defined].max(initial=0.0))


def _replay(where: Site, run: Recording, context: Context) -> Replay:
    """The site on a run's numbers."""
    tap = where.tap.name
    # Logits are computed of the last token of every call.
    rows = positions_of(LOGITS, run.calls) if tap == LOGITS else slice(None)
    return Replay(
        site=where,
        context=context,
        inputs={node: torch.from_numpy(run.values[name][rows]) for node, name in where.inputs.items()},
        output=torch.from_numpy(run.values[tap]),
        calls=run.calls,
        recorded={
            node: torch.from_numpy(run.values[name]) for name, (_, node) in context.taps.items() if name in run.values
        },
    )


def describe_positions(
    differing: NDArray[np.int64], every: NDArray[np.int64], calls: Sequence[range], window: int | None
) -> str:
    """In words, where two runs differ, of `every` position compared; local layers see `window` keys, None without."""
    first = int(differing.min())
    if len(differing) > 0.9 * len(every):
        return f"from position {first} on"
    spoilt = [next(call for call in calls if position in call) for position in differing]
    if all(len(call) == 1 for call in spoilt):
        return f"only where tokens are decoded one by one, from position {first} on"
    offsets = [int(position) - call.start for position, call in zip(differing, spoilt, strict=True)]
    if all(call.start for call in spoilt) and window is not None and max(offsets) < window:
        return f"only at the first tokens of a later call, from position {first} on"
    if window is not None and first >= window - 1:
        return f"only past the window of {window} keys, from position {first} on"
    return f"at {len(differing)} of {len(every)} positions, from {first} on"
