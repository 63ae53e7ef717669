"""Cuts and seeds on logits made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transom.backends.sampling import Sampling
from transom.errors import SamplingError

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.3, 0.03, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
DRAWS = 4000


def drawn(sampling: Sampling, logits: Any = LOGITS, draws: int = DRAWS) -> dict[int, float]:
    generator = sampling.generator()
    ids, counts = np.unique([sampling.choose(logits, generator) for _ in range(draws)], return_counts=True)
    return {int(token): float(count) / draws for token, count in zip(ids, counts, strict=True)}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 5}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 99}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.1}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 5}),
        ({"top_p": 0.999}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 0.49}, {1, 3, 5}),
        ({"min_p": 0.51}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # Cut to 4/7 and 3/7 by k first, then the likeliest alone passes one half.
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.6}, {1, 3}),
    ],
)
def test_cuts_are_exact(options: dict[str, Any], kept: set[int]) -> None:
    shares = drawn(Sampling(temperature=1.0, seed=1, **options))
    assert set(shares) == kept
    total = PROBABILITIES[sorted(kept)].sum()
    # Four standard deviations of a share of 4,000 draws.
    assert all(abs(share - PROBABILITIES[token] / total) < 4 * 0.5 / DRAWS**0.5 for token, share in shares.items())


def test_temperature_sharpens_and_flattens() -> None:
    cold, hot = (drawn(Sampling(temperature=t, seed=1)) for t in (0.25, 4.0))
    assert cold[1] > 0.6 > 0.3 > hot[1]
    assert len(hot) == 6


def test_greedy_ignores_the_seed() -> None:
    assert {Sampling(seed=seed).choose(LOGITS, Sampling(seed=seed).generator()) for seed in range(5)} == {1}


def test_a_seed_repeats_and_none_does_not() -> None:
    uniform = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        generator = sampling.generator()
        return [sampling.choose(uniform, generator) for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_extreme_logits_are_no_trouble() -> None:
    logits = np.array([-np.inf, 3e4, -3e4, 2.9e4], np.float32)
    assert set(drawn(Sampling(temperature=0.01, top_p=0.9, min_p=0.1, seed=0), logits, 20)) == {1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300, 1e-30, 1e300])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 3, "top_p": 1e-12, "min_p": 1.0}, {"top_k": 10**30}])
def test_temperatures_at_the_ends(temperature: float, cuts: dict[str, Any]) -> None:
    """Near 0 the likeliest token is taken, and equal ones in equal shares; very hot, all that is not cut off."""
    sampling = Sampling(temperature=temperature, seed=0, **cuts)
    logits = np.array([-np.inf, 3e38, -3e38, 2.9e38], np.float32)
    if temperature > 1:
        assert set(drawn(sampling, logits, 20)) <= {1, 2, 3}
        return
    assert set(drawn(sampling, logits, 20)) == {1}
    if "min_p" not in cuts:
        assert set(drawn(sampling, np.array([2.0, 1.0, 2.0], np.float32), 40)) == {0, 2}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers(temperature: float, value: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=2)
    with pytest.raises(SamplingError, match=f"the largest of the model's logits is {value}"):
        sampling.choose(np.array([1.0, value, 2.0], np.float32), sampling.generator())
    with pytest.raises(SamplingError, match="is -inf"):
        sampling.choose(np.full(3, -np.inf, np.float32), sampling.generator())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"), ("temperature", None), ("temperature", True), ("top_k", 1.5), ("top_p", []),
        ("min_p", "0"), ("seed", 0.5),
        ("temperature", -0.1), ("temperature", 10**400), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", float("nan")),
        ("seed", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(SamplingError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]
