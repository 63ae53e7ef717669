"""GPTQ against rounding to nearest, and against its own definition on a case small enough to write out."""

from __future__ import annotations

import pytest
import torch

from transom.formats.quantized import decode
from transom.formats.rounding import find_grid, round_rows
from transom.formats.schemes import SPECS, QuantSpec
from transom.training.gptq import _inverse_factor, gptq

SPEC_LIST = [
    SPECS["int4_block32"], SPECS["int4_channel"], SPECS["int8_block32"], SPECS["fp8_e4m3"],
    QuantSpec(format="int4", block=32, symmetric=False),
]  # fmt: skip


def inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations with a few large columns, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    few, many = (torch.randn(size, generator=generator) for size in ((rows, columns // 2), (columns // 2, columns)))
    mixed: torch.Tensor = few @ many / columns**0.5 + 0.1 * torch.randn(rows, columns, generator=generator)
    mixed[:, ::17] *= 5
    return mixed


@pytest.mark.parametrize("spec", SPEC_LIST, ids=QuantSpec.describe)
def test_products_change_less_than_by_rounding_to_nearest(spec: QuantSpec) -> None:
    x, weight = inputs(500, 256), torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    rounded = gptq(weight, x.T @ x, spec)
    assert rounded.codes.shape == (40, 256 // spec.group(256), spec.group(256))
    near = round_rows(weight, spec, "mse")

    def error(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> float:
        return float((x @ (decode(codes, scales, zeros, spec.format).view_as(weight) - weight).T).square().sum())

    other = inputs(500, 256, seed=5)
    assert error(rounded.codes, rounded.scales, rounded.zero_points) < 0.6 * error(
        near.codes, near.scales, near.zero_points
    )
    x = other  # and on inputs that were not calibrated on, of another mixture
    assert error(rounded.codes, rounded.scales, rounded.zero_points) < 10 * error(
        near.codes, near.scales, near.zero_points
    )


def test_columns_that_do_not_correlate_are_rounded_to_nearest() -> None:
    spec, weight = SPECS["int8_block32"], torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    rounded = gptq(weight, torch.eye(64) * 3, spec)
    blocks = weight.view(5, 2, 32)
    grid = find_grid(blocks, spec, "mse", importance_GC=torch.ones(2, 32))
    assert torch.equal(rounded.scales, grid.divisors)
    assert torch.equal(rounded.codes.float() - 128, (blocks / grid.divisors[..., None]).round().clamp(-128, 127))


def test_dead_columns_and_dead_text_are_no_trouble() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x = inputs(100, 64)
    x[:, :10] = 0
    for moments in (x.T @ x, torch.zeros(64, 64)):
        rounded = gptq(weight, moments, SPECS["int4_block32"])
        assert bool(torch.isfinite(rounded.scales).all())
        again = decode(rounded.codes, rounded.scales, None, "int4").view_as(weight)
        assert float((again - weight).abs().max()) < 3


def test_the_factor_is_that_of_the_inverse() -> None:
    moments = (inputs(300, 64).T @ inputs(300, 64)).double()
    upper = _inverse_factor(moments)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(moments), rtol=1e-8, atol=1e-12)
