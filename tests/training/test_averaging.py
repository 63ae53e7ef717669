"""Averages of weights: the papers' known answers, and averages that read blocks equal plain tensors."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tolerances import FLOAT64_SUMS
from transom.errors import MergeError
from transom.graphs.weight import Weight
from transom.training import averaging
from transom.training.averaging import Average, MergedTensor, arc, liti, mean, merge_weights, slerp

AXES = torch.eye(3, dtype=torch.float64)


def close(actual: torch.Tensor, *expected: float, digits: int = 4) -> bool:
    return [round(value, digits) for value in actual.flatten().tolist()] == list(expected)


def test_two_directions_at_right_angles() -> None:
    merged = slerp([AXES[0], AXES[1]])
    assert close(merged, 0.7071, 0.7071, 0.0) and float(merged.norm()) == pytest.approx(1.0)


def test_three_directions_one_after_the_other() -> None:
    merged = slerp([*AXES])
    assert close(merged, 0.612, 0.612, 0.5, digits=3) and float(merged.norm()) == pytest.approx(1.0)


def test_a_step_back_to_the_start() -> None:
    start = torch.zeros(2, dtype=torch.float64)
    merged = slerp([AXES[0, :2], AXES[1, :2]])
    assert close(liti(start, start + merged, 0.3), 0.2121, 0.2121)
    assert torch.equal(liti(start, merged), liti(start, merged, 0.3)), "the paper's own"


def test_the_share_is_the_angle_gone() -> None:
    """With two vectors, the second's share is lambda: of an angle of 60 degrees, 15 at a quarter."""
    second = torch.tensor([0.5, math.sqrt(0.75), 0.0], dtype=torch.float64)
    merged = slerp([AXES[0], second], [0.75, 0.25])
    assert close(merged, round(math.cos(math.radians(15)), 4), round(math.sin(math.radians(15)), 4), 0.0)


def test_the_ends_are_the_vectors_themselves() -> None:
    left, right = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp([left, right], [1.0, 0.0]), left)
    assert torch.equal(slerp([left, right], [0.0, 1.0]), right)
    assert torch.equal(slerp([left, left + 1, right], [0.0, 0.0, 1.0]), right)


def test_longer_vectors_keep_their_part() -> None:
    """The angle is between directions; lengths stay in the sum, as the paper writes it."""
    merged = slerp([3 * AXES[0], 4 * AXES[1]])
    assert close(merged, 2.1213, 2.8284, 0.0)


@pytest.mark.parametrize("tilt", [0.0, 1e-9, 1e-5])
def test_no_angle_is_a_straight_line(tilt: float) -> None:
    left, right = torch.tensor([1.0, 0.0]).double(), torch.tensor([3.0, 3.0 * tilt]).double()
    products = torch.stack([left, right]) @ torch.stack([left, right]).T
    assert arc(products, [0.25, 0.75]).angles == (None,)
    assert torch.allclose(slerp([left, right], [0.25, 0.75]), 0.25 * left + 0.75 * right, rtol=FLOAT64_SUMS)


def test_the_arc_meets_the_straight_line_where_it_ends() -> None:
    """Where the formula takes over, it gives the same numbers to the square of the angle."""
    right = torch.tensor([math.cos(2e-4), math.sin(2e-4), 0.0], dtype=torch.float64)
    products = torch.stack([AXES[0], right]) @ torch.stack([AXES[0], right]).T
    curved = arc(products, [0.5, 0.5])
    assert curved.angles[0] == pytest.approx(2e-4, rel=1e-3)
    assert torch.allclose(slerp([AXES[0], right]), (AXES[0] + right) / 2, atol=(2e-4) ** 2)


def test_opposite_directions_and_nothing_added() -> None:
    assert torch.equal(slerp([AXES[0], -AXES[0]]), torch.zeros(3).double())
    assert torch.equal(slerp([AXES[0], 0 * AXES[0]]), AXES[0] / 2)
    assert torch.equal(slerp([0 * AXES[0], 0 * AXES[0]]), 0 * AXES[0])


def test_what_a_feature_costs_to_average() -> None:
    """WARM's known answer. A feature that a run learns with probability p: together they have it with p, and the
    product of two averaged layers keeps p squared of it.
    """
    p, runs = 0.3, 40_000
    learnt = (torch.rand(runs, 1, generator=torch.Generator().manual_seed(0)) < p).double()
    together = float((learnt * learnt).mean())
    averaged = mean([*learnt])
    assert together == pytest.approx(p, abs=0.01)
    assert float(averaged * averaged) == pytest.approx(p * p, abs=0.01)


def test_the_mean_of_equals_is_equal() -> None:
    """To the bit, although a third is no number of the machine."""
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mean([numbers] * 3), numbers)
    assert mean([numbers.bfloat16(), numbers]).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(), (7,), (9, 5), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("method", averaging.METHODS)
def test_blocks_are_the_whole(method: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "BLOCK_NUMBERS", 11)
    draw = torch.Generator().manual_seed(2)
    start, *ends = (torch.randn(shape, generator=draw) for _ in range(3 if method == "ema" else 4))
    average = Average.of(method, len(ends), shares=None if method == "ema" else (0.5, 0.3, 0.2))
    given = {"w": Weight.of(start)} if average.has_start else None
    merged = merge_weights(average, [{"w": Weight.of(end)} for end in ends], given)["w"].weight("merged")
    task_vectors = [end.double() - start.double() for end in ends]
    expected = {
        "mean": lambda: mean(ends, (0.5, 0.3, 0.2)),
        "ema": lambda: liti(ends[0], ends[1], 0.01),
        "slerp": lambda: start + slerp(task_vectors, (0.5, 0.3, 0.2)),
        "liti": lambda: liti(start, mean(ends, (0.5, 0.3, 0.2))),
        "warp": lambda: start + 0.3 * slerp(task_vectors, (0.5, 0.3, 0.2)),
    }[method]()
    assert merged.shape == shape and torch.allclose(merged.read().double(), expected.double(), rtol=1e-6, atol=1e-6)
    if shape:
        assert torch.equal(merged.read_rows(2, 5), merged.read()[2:5])


def test_no_more_is_read_at_once_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tensor's size: so a table of 262,144 rows takes no more memory than a small one."""
    monkeypatch.setattr(averaging, "BLOCK_NUMBERS", 1000)
    sizes: list[int] = []

    def read_rows(start: int, stop: int) -> torch.Tensor:
        sizes.append((stop - start) * 64)
        return torch.zeros(stop - start, 64).add_(torch.arange(start, stop)[:, None])

    table = Weight(shape=(5000, 64), dtype=torch.float32, read_rows=read_rows, origin="synthetic")
    counted: list[int] = []
    tensor = MergedTensor(Average.of("warp", 2), [table, table, table], counted.append)
    tensor.weight("merged").read()
    assert max(sizes) == 15 * 64 <= 1000
    assert sum(sizes) == 2 * 3 * 5000 * 64 == sum(counted) // 4, "twice every model: angles, then the sum"


BAD = {
    "unknown": (("median", 2), {}, "no method named 'median'"),
    "one": (("mean", 1), {}, "of one model is that model"),
    "three anchors": (("ema", 3), {}, "takes two models"),
    "sum": (("mean", 2), {"shares": (0.5, 0.6)}, "sum to 1.1: give shares that sum to 1"),
    "NaN": (("mean", 2), {"shares": (math.nan, 0.6)}, "each lies between 0 and 1"),
    "negative": (("mean", 2), {"shares": (-0.5, 1.5)}, "each lies between 0 and 1"),
    "count": (("slerp", 3), {"shares": (0.5, 0.5)}, "2 shares for 3 models"),
    "eta": (("mean", 2), {"eta": 0.3}, "mean reads no --eta"),
    "far": (("warp", 2), {"eta": 1.5}, "--eta is 1.5"),
    "mu": (("slerp", 2), {"mu": 0.3}, "slerp reads no --mu"),
    "shares of a moving average": (("ema", 2), {"shares": (0.5, 0.5)}, "reads no shares: give --mu"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    args, options, words = BAD[case]
    with pytest.raises(MergeError, match=words):
        Average.of(*args, **options)  # type: ignore[arg-type]


def test_a_start_that_lacks_or_is_not_read() -> None:
    weights = {"w": Weight.of(torch.ones(2))}
    with pytest.raises(MergeError, match="give --start MODEL"):
        merge_weights(Average.of("warp", 2), [weights, weights])
    with pytest.raises(MergeError, match="reads no --start"):
        merge_weights(Average.of("mean", 2), [weights, weights], weights)
