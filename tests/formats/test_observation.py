"""Statistics of numbers: known answers, merging, percentiles, clipping scales."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.tolerances import BUCKET
from transom.errors import ConfigError
from transom.formats.number_format import FLOATS, FORMATS, float_format
from transom.formats.observation import SIZE, Observation
from transom.graphs.observe import observe


def seen(*numbers: float, dtype: torch.dtype = torch.float32) -> Observation:
    return Observation.of(observe(torch.tensor(numbers, dtype=dtype)).numpy())


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_extremes_and_counts_are_exact() -> None:
    found = seen(-3.25, 0.0, -0.0, 1e-42, 7.7, math.inf, math.nan, -math.inf)
    assert (found.minimum, found.maximum) == (-3.25, float(np.float32(7.7)))
    assert (found.count, found.zeros, found.nonfinite) == (5, 2, 3)
    assert found.largest == float(np.float32(7.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    found = seen(-2.0, 1.5, 0.0, dtype=dtype)
    assert (found.minimum, found.maximum, found.count, found.zeros) == (-2.0, 1.5, 3, 1)


def test_nothing_at_all() -> None:
    found = Observation.of(observe(torch.empty(0, 4)).numpy())
    assert (found.count, found.largest, found.nonfinite) == (0, 0.0, 0)
    assert found.share_above(1.0) == found.share_below(1.0) == 0.0
    with pytest.raises(ValueError, match="no number was seen"):
        found.percentile(50)
    assert seen(math.nan).count == 0


def test_the_fake_knows_the_shape() -> None:
    found = torch.ops.transom.observe.default(torch.empty(3, 4, dtype=torch.float16, device="meta"))
    assert tuple(found.shape) == (SIZE,) and found.dtype == torch.float64


def test_batches_merge_to_what_all_at_once_gives() -> None:
    numbers = normal(3000)
    merged = Observation.none()
    for start in range(0, 3000, 700):
        merged = merged.merge(Observation.of(observe(numbers[start : start + 700]).numpy()))
    whole = Observation.of(observe(numbers).numpy())
    assert (merged.minimum, merged.maximum, merged.zeros) == (whole.minimum, whole.maximum, whole.zeros)
    np.testing.assert_array_equal(merged.counts, whole.counts)


def test_percentiles_are_right_within_a_bucket() -> None:
    numbers = torch.cat((normal(20_000), torch.zeros(5000)))
    found = Observation.of(observe(numbers).numpy())
    for percent in (30, 50, 90, 99, 99.9):
        exact = float(np.percentile(numbers.abs().numpy(), percent))
        assert abs(found.percentile(percent) - exact) <= BUCKET * exact
    assert found.percentile(10) == 0.0, "a fifth are zeros"
    assert found.percentile(100) == float(numbers.abs().max())
    with pytest.raises(ValueError, match="between 0 and 100"):
        found.percentile(101)


def test_shares() -> None:
    found = seen(0.0, 1.0, 2.0, 4.0, 70_000.0)
    assert found.share_above(65_504) == 0.2
    assert found.share_below(1.5) == 0.25, "zeros are no underflow"
    # The bucket of 65535 begins below 65504; that one number is larger is known from the maximum.
    assert seen(1.0, 65_535.0).share_above(65_504) == 0.5
    assert seen(1.0, 65_504.0).share_above(65_504) == 0.0


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_torchs(name: str) -> None:
    made, dtype = FORMATS[name], getattr(torch, name)
    spread = torch.exp2(torch.linspace(-30, 9, 5000))
    numbers = torch.cat((normal(5000) * spread, torch.tensor([0.0, made.largest, -made.largest, made.smallest])))
    expected = numbers.clamp(-made.largest, made.largest).to(dtype).double().numpy()
    np.testing.assert_array_equal(made.round(numbers.double().numpy()), expected)
    assert made.largest == torch.finfo(dtype).max


def test_integers_round_and_clip() -> None:
    found = FORMATS["int4"].round(np.array([-9.0, -0.5, 0.4, 1.5, 2.5, 6.6]))
    np.testing.assert_array_equal(found, [-7, 0, 0, 2, 2, 7])


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of float16, bfloat16, float8_e4m3fn"):
        float_format("int8")


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3fn"])
def test_a_clipping_scale_of_one_magnitude_is_exact(name: str) -> None:
    """All numbers are 3 or -3: the scale that holds 3 exactly makes no error."""
    found, made = seen(3.0, -3.0, 3.0), FORMATS[name]
    scale = found.clip_scale(made)
    assert found.squared_error(scale, made) < 1e-12
    assert made.round(np.array([3.0 / scale]))[0] * scale == pytest.approx(3.0)


def test_int4_clips_a_normal_distribution() -> None:
    """The best symmetric 15-level quantiser of a normal distribution has steps of 0.3352 deviations (16 levels)."""
    scale = Observation.of(observe(normal(200_000)).numpy()).clip_scale(FORMATS["int4"])
    assert 0.33 < scale < 0.37


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3fn"])
def test_no_other_scale_has_less_true_error(name: str) -> None:
    """Against a search over the numbers themselves, with one far outlier among them."""
    made = FORMATS[name]
    numbers = torch.cat((normal(20_000), torch.tensor([40.0])))
    exact = numbers.double().numpy()

    def error(scale: float) -> float:
        return float(np.square(made.round(exact / scale) * scale - exact).mean())

    scale = Observation.of(observe(numbers).numpy()).clip_scale(made)
    least = min(error(40.0 * 2 ** (-step / 32) / made.largest) for step in range(200))
    assert error(scale) < 1.02 * least
    assert Observation.of(observe(numbers).numpy()).squared_error(scale, made) == pytest.approx(error(scale), rel=0.02)


def test_zeros_alone_have_a_scale() -> None:
    assert seen(0.0, 0.0).clip_scale(FORMATS["int8"]) == 1.0
