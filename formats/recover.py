"""Finding the grid of numbers that stand on one, such as those of a checkpoint trained for 4 bits, saved in bfloat16.

Released checkpoints of this kind hold `code * scale`, rounded to the dtype that they are saved in, and neither codes
nor scales. Rounding such numbers to a grid of our own would round them a second time. So for every group the scale is
looked for that gives each number exactly, as saved; a group without one is not on a grid, and none is made up.

Axes: R rows, G groups of columns that share a scale, C columns of a group.
"""

from __future__ import annotations

import torch

from transom.formats.rounding import Rounded
from transom.formats.schemes import QuantSpec

_DTYPES = ((torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24))
"""Dtypes that numbers may have been rounded to, with their significant bits, narrowest first."""


def saved_dtype(numbers: torch.Tensor) -> tuple[torch.dtype, int]:
    """The narrowest dtype that holds all of some float32 numbers as they are, and its significant bits."""
    return next((dtype, bits) for dtype, bits in _DTYPES if torch.equal(numbers.to(dtype).float(), numbers))


def recover(blocks_RGC: torch.Tensor, spec: QuantSpec, saved: tuple[torch.dtype, int]) -> Rounded | None:
    """Codes and scales of numbers that stand on a spec's grids.

    Args:
        blocks_RGC: float32.
        spec: Of symmetric integers.
        saved: What the numbers were rounded to when they were saved; see `saved_dtype`.

    Returns:
        Codes whose numbers, rounded to that dtype, are the given ones; None if some group has none.
    """
    middle = 2 ** (spec.bits - 1)
    dtype, digits = saved
    largest_RG = blocks_RGC.abs().amax(-1)
    left_RG = largest_RG > 0
    codes = torch.full(blocks_RGC.shape, middle, dtype=torch.uint8)
    scales = torch.ones_like(largest_RG)
    # As far as a number may have been moved when it was saved: half of its last digit; below a power of two, a quarter.
    mantissas, exponents = torch.frexp(blocks_RGC)
    half_RGC = torch.ldexp(torch.ones_like(blocks_RGC), exponents - 1 - digits)
    below_RGC = torch.where(mantissas.abs() == 0.5, half_RGC / 2, half_RGC)
    for furthest in _furthest_codes(spec):
        rows, groups = left_RG.nonzero(as_tuple=True)
        if not len(rows):
            break
        part_NC, half_NC, below_NC = (x[rows, groups] for x in (blocks_RGC, half_RGC, below_RGC))
        guess_N = largest_RG[rows, groups] / furthest
        sign_N = _signs(part_NC, furthest, spec)
        codes_NC = (part_NC / (guess_N * sign_N)[:, None]).round()
        size_NC = codes_NC.abs().clamp(min=1).double()
        # Every number but zero bounds the scale. The bounds may be a float32's last digit apart.
        low_N = torch.where(codes_NC == 0, 0, (part_NC.abs().double() - below_NC) / size_NC).amax(-1)
        high_N = torch.where(codes_NC == 0, torch.inf, (part_NC.abs().double() + half_NC) / size_NC).amin(-1)
        scale_N = _roundest(low_N, high_N) * sign_N
        again_NC = (codes_NC * scale_N[:, None]).to(dtype).float()
        fits_N = (again_NC == part_NC).all(-1) & (codes_NC >= -middle).all(-1) & (codes_NC < middle).all(-1)
        rows, groups = rows[fits_N], groups[fits_N]
        codes[rows, groups] = (codes_NC[fits_N] + middle).to(torch.uint8)
        scales[rows, groups] = scale_N[fits_N]
        left_RG[rows, groups] = False
    return None if bool(left_RG.any()) else Rounded(codes=codes, scales=scales, zero_points=None)


def _furthest_codes(spec: QuantSpec) -> list[int]:
    """Codes that the largest number may have; those that common quantisers give it, first."""
    middle = 2 ** (spec.bits - 1)
    return list(range(middle, 0, -1)) if spec.bits == 4 else [middle - 1, middle]


def _signs(part_NC: torch.Tensor, furthest: int, spec: QuantSpec) -> torch.Tensor:
    """Sign of the scale: the lowest code has no positive twin, so a largest number that has it decides."""
    if furthest < 2 ** (spec.bits - 1):
        return torch.ones(len(part_NC))
    extreme_N = part_NC.gather(-1, part_NC.abs().argmax(-1, keepdim=True))[:, 0]
    return torch.where(extreme_N < 0, 1.0, -1.0)


def _roundest(low_N: torch.Tensor, high_N: torch.Tensor) -> torch.Tensor:
    """A scale between bounds: one of few digits, as scales are saved in half precision themselves, or the middle."""
    middle_N = (low_N + high_N) / 2
    for dtype in (torch.bfloat16, torch.float16):
        short_N = middle_N.to(dtype).double()
        # Not on a bound, where a number would be a tie.
        middle_N = torch.where((short_N > low_N) & (short_N < high_N), short_N, middle_N)
    return middle_N.float()
