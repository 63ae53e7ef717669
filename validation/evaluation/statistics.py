"""Numbers of an evaluation with their uncertainty: means, differences, win rates and pass@k. Needs no torch.

Intervals come from the bootstrap over prompts: prompts are what an evaluation draws by chance, so they are drawn anew,
each with all that was measured on it. Two systems on the same prompts are compared pair by pair: how hard a prompt is
does not count as noise between them then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transom.errors import EvaluationError

RESAMPLES = 10_000
"""Draws of the bootstrap: the ends of a 95% interval stand still to about a fiftieth of its width."""

LEVEL = 0.95

_DRAWN = 2**22
"""Prompts drawn at a time, which bounds memory to 32 MiB an array."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts and its interval.

    Attributes:
        value: The mean of what was measured.
        low: Where the interval begins.
        high: Where it ends.
        prompts: How many prompts were measured.
    """

    value: float
    low: float
    high: float
    prompts: int

    def to_json(self) -> dict[str, float | int]:
        """As an object of JSON."""
        return dataclasses.asdict(self)


def estimate_mean(scores: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """The mean of a score a prompt, such as exact match (0 or 1), KL in nats or pass@k, with its interval.

    The interval is the bootstrap's percentile interval. With few prompts it is too narrow (about 90% in place of 95%
    for ten), and if all scores are equal it has no width: what was not seen may be there all the same.

    Args:
        scores: [P] a number a prompt. Several samples of one prompt are averaged before.
        seed: Of the draws; the same seed gives the same interval.
        resamples: How often prompts are drawn anew.
        level: Share of evaluations whose interval holds the true mean.

    Raises:
        EvaluationError: If there is no prompt, a score is not finite, or a setting is out of range.
    """
    scores_P = _vector(scores, "scores")
    _check(resamples, level)
    draw, count = np.random.default_rng(seed), len(scores_P)
    means_R = np.empty(resamples)
    step = max(1, _DRAWN // count)
    for start in range(0, resamples, step):
        drawn_RP = draw.integers(0, count, (min(step, resamples - start), count))
        means_R[start : start + len(drawn_RP)] = scores_P[drawn_RP].mean(1)
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value=float(scores_P.mean()), low=float(low), high=float(high), prompts=count)


def estimate_runs(scores: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """The mean of a score that every one of a few runs has on the same prompts, with its interval.

    Runs and prompts are drawn anew, each for itself: another training run and other prompts would both have given
    another mean. With few runs the interval is too narrow, and with a single one it is of the prompts alone.

    Args:
        scores: [S, P] a number a run and prompt.
        seed: See `estimate_mean`.
        resamples: See `estimate_mean`.
        level: See `estimate_mean`.

    Raises:
        EvaluationError: As `estimate_mean`, and if the scores are no table.
    """
    scores_SP = np.asarray(scores, np.float64)
    if scores_SP.ndim != 2:
        raise EvaluationError(f"scores of shape {list(scores_SP.shape)}: give a row a run and a column a prompt")
    _vector(scores_SP.ravel(), "scores")
    _check(resamples, level)
    draw, (runs, count) = np.random.default_rng(seed), scores_SP.shape
    means_R = np.empty(resamples)
    step = max(1, _DRAWN // scores_SP.size)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        # The mean over drawn runs, prompt by prompt, and of that the mean over drawn prompts.
        means_RP = scores_SP[draw.integers(0, runs, (size, runs))].mean(1) if runs > 1 else scores_SP.repeat(size, 0)
        drawn_RP = draw.integers(0, count, (size, count))
        means_R[start : start + size] = np.take_along_axis(means_RP, drawn_RP, 1).mean(1)
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value=float(scores_SP.mean()), low=float(low), high=float(high), prompts=count)


def estimate_difference(
    scores: ArrayLike, others: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate:
    """How much higher one system scores than another on the same prompts, on average, with the interval.

    Args:
        scores: [P] of the one.
        others: [P] of the other, in the same order of prompts.
        seed: See `estimate_mean`.
        resamples: See `estimate_mean`.
        level: See `estimate_mean`.

    Raises:
        EvaluationError: As `estimate_mean`, and if the systems have not the same number of prompts.
    """
    left_P, right_P = _pairs(scores, others)
    return estimate_mean(left_P - right_P, seed=seed, resamples=resamples, level=level)


def win_rate(
    scores: ArrayLike, others: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate:
    """Share of prompts on which one system scores higher than another, ties counted half; 0.5 if neither is better.

    Args:
        scores: [P] of the one.
        others: [P] of the other, in the same order of prompts.
        seed: See `estimate_mean`.
        resamples: See `estimate_mean`.
        level: See `estimate_mean`.

    Raises:
        EvaluationError: As `estimate_difference`.
    """
    left_P, right_P = _pairs(scores, others)
    wins_P = np.where(left_P > right_P, 1.0, np.where(left_P == right_P, 0.5, 0.0))
    return estimate_mean(wins_P, seed=seed, resamples=resamples, level=level)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Chance that at least one of `k` samples of a prompt passes: 1 - C(n - c, k) / C(n, k), without bias.

    As a product (arXiv 2107.03374), so that no large number is ever computed. Its mean over prompts is pass@k of a set.

    Args:
        samples: How many were drawn, n.
        passed: How many of them passed, c.
        k: At most n.

    Raises:
        EvaluationError: If the numbers do not fit.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise EvaluationError(f"pass@{k} of {samples} samples of which {passed} passed: draw at least k of them")
    if samples - passed < k:
        return 1.0
    return float(-np.expm1(np.log1p(-k / np.arange(samples - passed + 1, samples + 1)).sum()))


def passes_at_k(samples: Sequence[int], passed: Sequence[int], k: int) -> NDArray[np.float64]:
    """`pass_at_k` of every prompt, [P], for `estimate_mean`.

    Raises:
        EvaluationError: If there are not as many numbers of the one kind as of the other, or some do not fit.
    """
    if len(samples) != len(passed):
        raise EvaluationError(f"{len(samples)} prompts were sampled and {len(passed)} judged: give both of each")
    return np.array([pass_at_k(n, c, k) for n, c in zip(samples, passed, strict=True)])


def _check(resamples: int, level: float) -> None:
    if resamples < 1 or not 0.0 < level < 1.0:
        raise EvaluationError(f"{resamples} draws at the level {level}: give at least one, and a level between 0 and 1")


def _vector(scores: ArrayLike, what: str) -> NDArray[np.float64]:
    vector = np.asarray(scores, np.float64)
    if vector.ndim != 1 or not vector.size:
        raise EvaluationError(f"{what} of shape {list(vector.shape)}: give one number for each of some prompts")
    if wrong := np.flatnonzero(~np.isfinite(vector)).tolist():
        raise EvaluationError(f"the {what} of {len(wrong)} prompts are not finite, first of prompt {wrong[0]}")
    return vector


def _pairs(scores: ArrayLike, others: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    left_P, right_P = _vector(scores, "scores"), _vector(others, "other scores")
    if len(left_P) != len(right_P):
        raise EvaluationError(f"{len(left_P)} and {len(right_P)} prompts: compare systems on the same ones")
    return left_P, right_P
