"""`transom.fake_quantize`: numbers rounded to a grid and back, with gradients, so that a model can be trained for it.

Forward, it gives exactly what `formats.rounding.encode` and `formats.quantized.decode` give: what is trained is what is
deployed. Backward, it is the straight-through estimator with a learned step (LSQ, arXiv 1902.08153): the gradient of a
number passes where it was not clipped; that of a scale is the sum over its group of

    code - w / scale    where it was not clipped        the code that it was clipped to, elsewhere

over the square root of (columns of a group times the highest code). Scales of floats get none.
"""

from __future__ import annotations

from typing import Any

import torch

from transom.formats.rounding import Grid, values
from transom.formats.schemes import QuantSpec


@torch.library.custom_op("transom::fake_quantize", mutates_args=())
def fake_quantize(
    weight_RK: torch.Tensor, divisors_RG: torch.Tensor, zero_points_RG: torch.Tensor | None, spec: str
) -> torch.Tensor:
    """Round a matrix to its grid.

    Args:
        weight_RK: float32.
        divisors_RG: What its groups are divided by, float32; see `formats.rounding.Grid`.
        zero_points_RG: Code that means zero, float32; None if the spec is symmetric.
        spec: A `QuantSpec`'s key.

    Returns:
        float32 [R, K].
    """
    blocks_RGC = weight_RK.reshape(*divisors_RG.shape, -1)
    grid = Grid(divisors=divisors_RG, zero_points=zero_points_RG)
    return values(blocks_RGC, grid, QuantSpec.of_key(spec)).reshape(weight_RK.shape)


@fake_quantize.register_fake
def _(
    weight_RK: torch.Tensor, divisors_RG: torch.Tensor, zero_points_RG: torch.Tensor | None, spec: str
) -> torch.Tensor:
    return weight_RK.new_empty(weight_RK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    weight_RK, divisors_RG, zero_points_RG, ctx.spec = inputs
    ctx.save_for_backward(weight_RK, divisors_RG, zero_points_RG)


def _backward(ctx: Any, gradient_RK: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
    weight_RK, divisors_RG, zero_points_RG = ctx.saved_tensors
    spec = QuantSpec.of_key(ctx.spec)
    if not spec.is_integer:
        return gradient_RK, None, None, None
    top = 2**spec.bits - 1
    zeros: Any = 2.0 ** (spec.bits - 1) if zero_points_RG is None else zero_points_RG[..., None]
    gradient_RGC = gradient_RK.reshape(*divisors_RG.shape, -1)
    scaled_RGC = weight_RK.reshape(gradient_RGC.shape) / divisors_RG[..., None]
    # Half a step beyond the last code still rounds to it.
    outside = (scaled_RGC + zeros < -0.5) | (scaled_RGC + zeros > top + 0.5)
    to_weight = torch.where(outside, 0, gradient_RGC).reshape(weight_RK.shape)
    if not ctx.needs_input_grad[1]:
        return to_weight, None, None, None
    codes = (scaled_RGC + zeros).round_().clamp_(0, top).sub_(zeros)
    slope = torch.where(outside, codes, codes - scaled_RGC)
    columns = gradient_RGC.shape[-1]
    to_divisors = (slope * gradient_RGC).sum(-1) / (columns * (top // 2)) ** 0.5
    return to_weight, to_divisors, None, None


fake_quantize.register_autograd(_backward, setup_context=_save)

FAKE_QUANTIZE = torch.ops.transom.fake_quantize.default
