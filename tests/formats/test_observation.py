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
    observation = seen(-3.25, 0.0, -0.0, 1e-42, 7.7, math.inf, math.nan, -math.inf)
    assert (observation.minimum, observation.maximum) == (-3.25, float(np.float32(7.7)))
    assert (observation.count, observation.zeros, observation.nonfinite) == (5, 2, 3)
    assert observation.largest == float(np.float32(7.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    observation = seen(-2.0, 1.5, 0.0, dtype=dtype)
    assert (observation.minimum, observation.maximum, observation.count, observation.zeros) == (-2.0, 1.5, 3, 1)


def test_nothing_at_all() -> None:
    observation = Observation.of(observe(torch.empty(0, 4)).numpy())
    assert (observation.count, observation.largest, observation.nonfinite) == (0, 0.0, 0)
    assert observation.share_above(1.0) == observation.share_below(1.0) == 0.0
    with pytest.raises(ValueError, match="no number was seen"):
        observation.percentile(50)
    assert seen(math.nan).count == 0


def test_the_fake_knows_the_shape() -> None:
    record = torch.ops.transom.observe.default(torch.empty(3, 4, dtype=torch.float16, device="meta"))
    assert tuple(record.shape) == (SIZE,) and record.dtype == torch.float64


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
    observation = Observation.of(observe(numbers).numpy())
    for percent in (30, 50, 90, 99, 99.9):
        exact = float(np.percentile(numbers.abs().numpy(), percent))
        assert abs(observation.percentile(percent) - exact) <= BUCKET * exact
    assert observation.percentile(10) == 0.0, "a fifth are zeros"
    assert observation.percentile(100) == float(numbers.abs().max())
    with pytest.raises(ValueError, match="between 0 and 100"):
        observation.percentile(101)


def test_shares() -> None:
    observation = seen(0.0, 1.0, 2.0, 4.0, 70_000.0)
    assert observation.share_above(65_504) == 0.2
    assert observation.share_below(1.5) == 0.25, "zeros are no underflow"
    # The bucket of 65535 begins below 65504; that one number is larger is known from the maximum.
    assert seen(1.0, 65_535.0).share_above(65_504) == 0.5
    assert seen(1.0, 65_504.0).share_above(65_504) == 0.0


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_torchs(name: str) -> None:
    format, dtype = FORMATS[name], getattr(torch, name)
    spread = torch.exp2(torch.linspace(-30, 9, 5000))
    numbers = torch.cat((normal(5000) * spread, torch.tensor([0.0, format.largest, -format.largest, format.smallest])))
    expected = numbers.clamp(-format.largest, format.largest).to(dtype).double().numpy()
    np.testing.assert_array_equal(format.round(numbers.double().numpy()), expected)
    assert format.largest == torch.finfo(dtype).max


def test_integers_round_and_clip() -> None:
    codes = FORMATS["int4"].round(np.array([-9.0, -0.5, 0.4, 1.5, 2.5, 6.6]))
    np.testing.assert_array_equal(codes, [-7, 0, 0, 2, 2, 7])


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of float16, bfloat16, float8_e4m3fn"):
        float_format("int8")


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3fn"])
def test_a_clipping_scale_of_one_magnitude_is_exact(name: str) -> None:
    """All numbers are 3 or -3: the scale that holds 3 exactly makes no error."""
    observation, format = seen(3.0, -3.0, 3.0), FORMATS[name]
    scale = observation.clip_scale(format)
    assert observation.squared_error(scale, format) < 1e-12
    assert format.round(np.array([3.0 / scale]))[0] * scale == pytest.approx(3.0)


def test_int4_clips_a_normal_distribution() -> None:
    """The best symmetric 15-level quantiser of a normal distribution has steps of 0.3352 deviations (16 levels)."""
    scale = Observation.of(observe(normal(200_000)).numpy()).clip_scale(FORMATS["int4"])
    assert 0.33 < scale < 0.37


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3fn"])
def test_no_other_scale_has_less_true_error(name: str) -> None:
    """Against a search over the numbers themselves, with one far outlier among them."""
    format = FORMATS[name]
    numbers = torch.cat((normal(20_000), torch.tensor([40.0])))
    exact = numbers.double().numpy()

    def error(scale: float) -> float:
        return float(np.square(format.round(exact / scale) * scale - exact).mean())

    scale = Observation.of(observe(numbers).numpy()).clip_scale(format)
    least = min(error(40.0 * 2 ** (-step / 32) / format.largest) for step in range(200))
    assert error(scale) < 1.02 * least
    assert Observation.of(observe(numbers).numpy()).squared_error(scale, format) == pytest.approx(
        error(scale), rel=0.02
    )


def test_zeros_alone_have_a_scale() -> None:
    assert seen(0.0, 0.0).clip_scale(FORMATS["int8"]) == 1.0
