"""Intervals hold the truth as often as they say; pass@k and win rates are what the hand computes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from transom.errors import EvaluationError
from transom.validation.evaluation import statistics
from transom.validation.evaluation.statistics import (
    estimate_difference,
    estimate_mean,
    estimate_runs,
    pass_at_k,
    passes_at_k,
    win_rate,
)

TRIALS, PROMPTS = 400, 120

KINDS: dict[str, tuple[Any, float]] = {
    "exact match": (lambda draw: draw.random(PROMPTS) < 0.3, 0.3),
    "KL": (lambda draw: draw.gamma(2.0, 0.05, PROMPTS), 0.1),
    "wins": (lambda draw: draw.choice([0.0, 0.5, 1.0], PROMPTS, p=[0.2, 0.3, 0.5]), 0.65),
}


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_the_true_mean_as_often_as_they_say(kind: str) -> None:
    measure, truth = KINDS[kind]
    draw = np.random.default_rng(5)
    hits = 0
    for trial in range(TRIALS):
        estimate = estimate_mean(measure(draw), seed=trial, resamples=1000)
        hits += estimate.low <= truth <= estimate.high
    # Of 400 trials at 95%, the share lies within three deviations of .011; the percentile interval is a little narrow.
    assert 0.91 <= hits / TRIALS <= 0.985


def test_the_interval_is_that_of_a_normal_distribution() -> None:
    """Where the hand knows it: 1.96 standard errors to either side."""
    scores = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    estimate = estimate_mean(scores)
    error = scores.std() / math.sqrt(2000)
    assert estimate.value == pytest.approx(scores.mean()) and estimate.prompts == 2000
    assert (estimate.high - estimate.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.03)
    wider = estimate_mean(scores, level=0.99)
    assert wider.low < estimate.low < estimate.high < wider.high


def test_runs_and_prompts_both_count() -> None:
    """Effects of runs and of prompts, whose variances the hand adds; one run alone is as `estimate_mean` says."""
    draw = np.random.default_rng(2)
    runs, prompts = draw.normal(0, 0.3, 40), draw.normal(0, 1.0, 500)
    estimate = estimate_runs(runs[:, None] + prompts, resamples=4000)
    error = math.sqrt(runs.var() / 40 + prompts.var() / 500)
    assert estimate.value == pytest.approx(runs.mean() + prompts.mean()) and estimate.prompts == 500
    assert (estimate.high - estimate.low) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.05)
    alone, plain = estimate_runs(prompts[None], resamples=4000), estimate_mean(prompts, resamples=4000)
    assert (alone.low, alone.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    with pytest.raises(EvaluationError, match="a row a run"):
        estimate_runs(prompts)


def test_pairs_leave_out_how_hard_a_prompt_is() -> None:
    """A gain of .1 on each prompt, under differences between prompts that are ten times as large."""
    draw = np.random.default_rng(1)
    hardness = draw.normal(0, 1.0, 200)
    ours, theirs = hardness + 0.1 + draw.normal(0, 0.1, 200), hardness + draw.normal(0, 0.1, 200)
    gain = estimate_difference(ours, theirs)
    assert 0 < gain.low < 0.1 < gain.high and gain.high - gain.low < 0.06
    alone = estimate_mean(ours)
    assert alone.high - alone.low > 4 * (gain.high - gain.low), "what unpaired intervals would drown it in"


def test_the_same_seed_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(2).random(50)
    first = estimate_mean(scores, seed=7, resamples=500)
    assert estimate_mean(scores, seed=7, resamples=500) == first != estimate_mean(scores, seed=8, resamples=500)
    monkeypatch.setattr(statistics, "_DRAWN", 500)
    assert estimate_mean(scores, seed=7, resamples=500) == first, "in pieces, from the same stream"


def test_equal_scores_have_no_width() -> None:
    assert estimate_mean([1, 1, 1]).to_json() == {"value": 1.0, "low": 1.0, "high": 1.0, "prompts": 3}


def test_ties_count_half() -> None:
    assert win_rate([1, 0, 2, 2], [0, 1, 2, 2]).value == 0.5
    assert win_rate([1, 1, 1, 0], [0, 0, 1, 0]).value == 0.75
    ours, theirs = [0.3, 0.1, 0.5, 0.5], [0.2, 0.4, 0.5, 0.1]
    assert win_rate(ours, theirs).value + win_rate(theirs, ours).value == 1.0


@pytest.mark.parametrize(
    ("samples", "passed", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (10, 3, 1, 0.3),
        (5, 2, 2, 0.7),  # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
        (10, 1, 10, 1.0),
        (200, 7, 100, 1 - math.comb(193, 100) / math.comb(200, 100)),
        (10_000, 1, 1, 1e-4),
        (10**6, 2, 10**5, 1 - 0.9 * (9e5 - 1) / (1e6 - 1)),
    ],
)
def test_pass_at_k_by_hand(samples: int, passed: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_is_the_share_of_all_draws() -> None:
    outcomes = [True, True, False, False, False, False, True]
    for k in range(1, 8):
        draws = list(itertools.combinations(outcomes, k))
        assert pass_at_k(7, 3, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_has_no_bias() -> None:
    """Its mean over what may be drawn is the true chance, unlike 1 - (1 - c/n)^k."""
    rate, n, k = 0.2, 8, 3
    weights = [math.comb(n, c) * rate**c * (1 - rate) ** (n - c) for c in range(n + 1)]
    mean = float(np.dot(weights, passes_at_k([n] * (n + 1), range(n + 1), k)))
    assert mean == pytest.approx(1 - (1 - rate) ** k, rel=1e-12)


BAD: dict[str, tuple[Any, str]] = {
    "no prompts": (lambda: estimate_mean([]), "give one number for each"),
    "a table": (lambda: estimate_mean([[1.0, 2.0]]), r"scores of shape \[1, 2\]"),
    "NaN": (lambda: estimate_mean([0.0, math.nan, math.inf]), "2 prompts are not finite, first of prompt 1"),
    "level": (lambda: estimate_mean([1.0], level=95), "a level between 0 and 1"),
    "draws": (lambda: estimate_mean([1.0], resamples=0), "give at least one"),
    "pairs": (lambda: win_rate([1.0], [1.0, 2.0]), "1 and 2 prompts: compare systems on the same ones"),
    "k": (lambda: pass_at_k(4, 1, 5), "pass@5 of 4 samples"),
    "passed": (lambda: pass_at_k(4, 5, 1), "of which 5 passed"),
    "judged": (lambda: passes_at_k([4, 4], [1], 1), "2 prompts were sampled and 1 judged"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(EvaluationError, match=words):
        call()
