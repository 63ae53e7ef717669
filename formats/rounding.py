"""Rounding numbers to the grids of a `QuantSpec`: the one place for conversion, fake quantisation and calibration.

Axes: R rows, G groups of columns that share a scale, C columns of a group.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from transom.errors import QuantizationError
from transom.formats import float4, sfp8
from transom.formats.quantized import decode
from transom.formats.schemes import QuantSpec

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0

Method = Literal["nearest", "mse"]
"""How scales are found: so that the largest number just fits, or so that the sum of squared errors is least."""

_SHRINK = tuple(0.68 + 0.02 * step for step in range(20))
"""Factors on a scale that "mse" tries, beside 1: a little clipping costs less than a coarser grid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the grids of some rows lie.

    Attributes:
        divisors: What numbers are divided by to find their codes, float32 [R, G].
        zero_points: Code that means zero, float32 [R, G], or None.
    """

    divisors: torch.Tensor
    zero_points: torch.Tensor | None

    def scales(self, spec: QuantSpec) -> torch.Tensor:
        """What codes are multiplied by, float32 [R, G]: the divisors, in the spec's dtype of scales."""
        return self.divisors.to(getattr(torch, spec.scale_dtype)).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded:
    """Codes of some rows.

    Attributes:
        codes: Unpacked [R, G, C]: uint8, or float8_e4m3fn.
        scales: float32 [R, G].
        zero_points: uint8 [R, G], or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


def find_grid(
    blocks_RGC: torch.Tensor,
    spec: QuantSpec,
    method: Method = "nearest",
    *,
    importance_GC: torch.Tensor | None = None,
    tensor_max: float | None = None,
) -> Grid:
    """Place the grid of every group.

    Args:
        blocks_RGC: Numbers, float32.
        spec: The spec.
        method: How scales are found.
        importance_GC: For "mse", a weight for the error of every column, such as the mean square of what it is
            multiplied by; by default all count the same.
        tensor_max: Largest magnitude of the whole tensor, which a spec with one scale a tensor needs.

    Raises:
        QuantizationError: If the spec is of codes with offsets.
    """
    if spec.has_offsets:
        raise QuantizationError(f"nothing is rounded to {spec.describe()}: choose a scheme without them")
    if spec.block == "tensor":
        if tensor_max is None:
            raise QuantizationError(f"{spec.describe()} needs the largest number of the whole tensor")
        scale = _largest_fits(torch.tensor(tensor_max), spec)
        return Grid(divisors=scale.expand(blocks_RGC.shape[:2]), zero_points=None)
    plain = _plain_grid(blocks_RGC, spec)
    if method == "nearest":
        return plain
    best, least = plain, _error(blocks_RGC, plain, spec, importance_GC)
    # A power of two times anything else would be no power of two.
    factors = (0.5, 2.0) if spec.scale_dtype == "float8_e8m0fnu" else (*_SHRINK, 1.0)
    # Both signs are tried where the sign is free: the lowest code reaches one step further than the highest.
    signs = (1.0, -1.0) if spec.signed_scale else (1.0,)
    for factor in (sign * shrink for sign in signs for shrink in factors):
        if factor == 1.0:
            continue
        divisors = plain.divisors * factor
        zeros = plain.zero_points
        if zeros is not None:
            low = blocks_RGC.amin(-1).clamp(max=0) * factor
            zeros = torch.round(-low / divisors).clamp(0, 2**spec.bits - 1)
        grid = Grid(divisors=divisors, zero_points=zeros)
        error = _error(blocks_RGC, grid, spec, importance_GC)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            divisors=torch.where(better, grid.divisors, best.divisors),
            zero_points=None if zeros is None else torch.where(better, zeros, best.zero_points),  # type: ignore[arg-type]
        )
    return best


def _plain_grid(blocks_RGC: torch.Tensor, spec: QuantSpec) -> Grid:
    """Grids that just hold the largest number."""
    if not spec.symmetric:
        # The range holds zero, so that a zero weight stays zero.
        low, high = blocks_RGC.amin(-1).clamp(max=0), blocks_RGC.amax(-1).clamp(min=0)
        top = 2**spec.bits - 1
        scales = _no_zeros((high - low) / top)
        return Grid(divisors=scales, zero_points=torch.round(-low / scales).clamp(0, top))
    if spec.signed_scale:
        furthest = blocks_RGC.abs().argmax(-1, keepdim=True)
        extreme = blocks_RGC.gather(-1, furthest)[..., 0]
        divisors = extreme / -(2 ** (spec.bits - 1))
        # Codes are found with the reciprocal; where that is infinite, every number of the block becomes zero.
        return Grid(divisors=torch.where((1 / divisors).isinf(), 1.0, divisors), zero_points=None)
    return Grid(divisors=_largest_fits(blocks_RGC.abs().amax(-1), spec), zero_points=None)


def _largest_fits(largest: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    if spec.format == "sfp8":
        # Its makers scale only what would not fit.
        return torch.where(largest <= sfp8.LARGEST, 1.0, largest / sfp8.LARGEST)
    if spec.format == "float4_e2m1fn":
        return float4.largest_fits(largest)
    top = FLOAT8_MAX if spec.format == "float8_e4m3fn" else 2 ** (spec.bits - 1) - 1
    # Codes are computed with the stored scale, where its dtype is narrower.
    return _no_zeros((largest / top).to(getattr(torch, spec.scale_dtype)).float())


def _no_zeros(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 1.0, scales)


def _error(blocks_RGC: torch.Tensor, grid: Grid, spec: QuantSpec, importance_GC: torch.Tensor | None) -> torch.Tensor:
    squares = (values(blocks_RGC, grid, spec) - blocks_RGC).square_()
    return (squares if importance_GC is None else squares * importance_GC).sum(-1)


def values(blocks_RGC: torch.Tensor, grid: Grid, spec: QuantSpec) -> torch.Tensor:
    """Numbers of the nearest codes, float32 [R, G, C], as `encode` and then `formats.quantized.decode` give them."""
    scales = grid.scales(spec)[..., None]
    if not spec.is_integer:
        return decode(encode(blocks_RGC, grid, spec).codes, grid.scales(spec), None, spec.format)
    return _integers(blocks_RGC, grid, spec).sub_(_zeros(grid, spec)).mul_(scales)


def _zeros(grid: Grid, spec: QuantSpec) -> torch.Tensor | float:
    return 2.0 ** (spec.bits - 1) if grid.zero_points is None else grid.zero_points[..., None]


def _integers(blocks_RGC: torch.Tensor, grid: Grid, spec: QuantSpec) -> torch.Tensor:
    top = 2**spec.bits - 1
    if spec.signed_scale:
        # As llama.cpp rounds: times the reciprocal, halves up.
        scaled = blocks_RGC * (1 / grid.divisors)[..., None]
        return scaled.add_(2 ** (spec.bits - 1) + 0.5).floor_().clamp_(0, top)
    scaled = blocks_RGC / grid.divisors[..., None]
    if grid.zero_points is not None:
        return scaled.add_(grid.zero_points[..., None]).round_().clamp_(0, top)
    return scaled.round_().add_(2 ** (spec.bits - 1)).clamp_(0, top)


def encode(blocks_RGC: torch.Tensor, grid: Grid, spec: QuantSpec) -> Rounded:
    """Codes of the nearest numbers on the grid.

    Raises:
        QuantizationError: If a scale is too large for the spec's dtype of scales.
    """
    scales = grid.scales(spec)
    if not bool(torch.isfinite(scales).all()):
        raise QuantizationError(f"a scale does not fit {spec.scale_dtype}: choose a scheme with float32 scales")
    if spec.format == "sfp8":
        codes = sfp8.encode(blocks_RGC / grid.divisors[..., None])
    elif spec.format == "float4_e2m1fn":
        codes = float4.encode(blocks_RGC / grid.divisors[..., None])
    elif spec.format == "float8_e4m3fn":
        # Clamped first: what is out of range would become NaN.
        codes = (blocks_RGC / grid.divisors[..., None]).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    else:
        codes = _integers(blocks_RGC, grid, spec).to(torch.uint8)
    zeros = None if grid.zero_points is None else grid.zero_points.to(torch.uint8)
    return Rounded(codes=codes, scales=scales, zero_points=zeros)


def round_rows(
    rows_RK: torch.Tensor, spec: QuantSpec, method: Method = "nearest", *, tensor_max: float | None = None
) -> Rounded:
    """Round rows to their groups' grids; a group longer than a stored block is split, with its scale repeated.

    Args:
        rows_RK: float32.
        spec: The spec; see its `group` and `stored_block`.
        method: How scales are found.
        tensor_max: See `find_grid`.

    Returns:
        Codes [R, K / block, block] of stored blocks.
    """
    rows, columns = rows_RK.shape
    blocks_RGC = rows_RK.view(rows, -1, spec.group(columns))
    rounded = encode(blocks_RGC, find_grid(blocks_RGC, spec, method, tensor_max=tensor_max), spec)
    return split_groups(rounded, spec, columns)


def split_groups(rounded: Rounded, spec: QuantSpec, columns: int) -> Rounded:
    """Split the codes of groups into stored blocks, each with the scale and zero point of its group."""
    block, group = spec.stored_block(columns), rounded.codes.shape[2]
    if block == group:
        return rounded
    pieces = group // block
    return Rounded(
        codes=rounded.codes.reshape(rounded.codes.shape[0], -1, block),
        scales=rounded.scales.repeat_interleave(pieces, 1),
        zero_points=None if rounded.zero_points is None else rounded.zero_points.repeat_interleave(pieces, 1),
    )
