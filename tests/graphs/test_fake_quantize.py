"""Fake quantisation: exactly what conversion gives, and the gradients that the sources define."""

from __future__ import annotations

import pytest
import torch

from transom.formats.quantized import decode
from transom.formats.rounding import encode, find_grid
from transom.formats.schemes import SPECS, QuantSpec
from transom.graphs.fake_quantize import fake_quantize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["nearest", "mse"])
@pytest.mark.parametrize("spec", [*SPECS.values(), QuantSpec(format="int4", block=32, symmetric=False)], ids=str)
def test_forward_is_what_is_deployed(spec: QuantSpec, method: str) -> None:
    rows = normal(6, 256)
    blocks = rows.view(6, -1, spec.group(256))
    grid = find_grid(blocks, spec, method, tensor_max=float(rows.abs().max()))  # type: ignore[arg-type]
    encoded = encode(blocks, grid, spec)
    expected = decode(encoded.codes, encoded.scales, encoded.zero_points, spec.format).view_as(rows)
    assert torch.equal(fake_quantize(rows, grid.divisors.contiguous(), grid.zero_points, spec.key), expected)


def test_the_known_answer_of_learned_steps() -> None:
    """Weights (-20, -.6, .3, 10), a step of 1, codes from -8 to 7 (shared facts on training, LSQ)."""
    weight = torch.tensor([[-20.0, -0.6, 0.3, 10.0]], requires_grad=True)
    step = torch.ones(1, 1, requires_grad=True)
    rounded = fake_quantize(weight, step, None, QuantSpec(format="int4", block="row").key)
    assert rounded.tolist() == [[-8, -1, 0, 7]]
    rounded.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[0, 1, 1, 0]]
    assert step.grad is not None
    # Times the square root of the number of weights and the highest code, by which the gradient is scaled.
    assert float(step.grad) * (4 * 7) ** 0.5 == pytest.approx(-1.7, abs=1e-6)


def test_a_negative_scale_clips_at_the_other_end() -> None:
    weight = torch.tensor([[-10.0, 7.9, 8.4, 9.0]], requires_grad=True)
    rounded = fake_quantize(weight, torch.full((1, 1), -1.0), None, SPECS["int4_block32"].key)
    assert rounded.tolist() == [[-7, 8, 8, 8]]
    rounded.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[0, 1, 1, 0]]


def test_gradients_of_scales_agree_with_differences() -> None:
    """Where no code changes, the slope is that of the codes; the estimator adds the rounding error, and no more."""
    spec = QuantSpec(format="int8", block=32)
    weight, upstream = normal(3, 64), normal(3, 64, seed=1)
    step = (weight.view(3, 2, 32).abs().amax(-1) / 100).requires_grad_(True)
    (fake_quantize(weight, step, None, spec.key) * upstream).sum().backward()
    scaled = weight.view(3, 2, 32) / step.detach()[..., None]
    expected = ((scaled.round() - scaled) * upstream.view(3, 2, 32)).sum(-1) / (32 * 127) ** 0.5
    torch.testing.assert_close(step.grad, expected)


@pytest.mark.parametrize("name", ["fp8_e4m3", "sfp8"])
def test_floats_pass_the_gradient_through(name: str) -> None:
    weight, step = normal(2, 128).requires_grad_(True), torch.ones(2, 1, requires_grad=True)
    (3 * fake_quantize(weight, step, None, SPECS[name].key)).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((2, 128), 3.0))
    assert step.grad is None
