"""E2M1, the 4-bit float of MXFP4: a sign, two bits of exponent and one of mantissa, no infinities, no NaN.

MXFP4 has a power of two for each 32 of them (OCP Microscaling Formats Specification 1.0). Codes are 0 to 15, of which
bit 3 is the sign.
"""

from __future__ import annotations

import torch

_LARGEST_EXPONENT = 2
"""Of the power of two in 6, the largest number."""

_SIZES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = torch.cat((_SIZES, -_SIZES))
"""What every code means."""

_MIDDLES = (_SIZES[1:] + _SIZES[:-1]) / 2
# Ties go to the even code: from every other middle on, and above the rest.
_BOUNDS = torch.where(torch.arange(7) % 2 == 1, torch.nextafter(_MIDDLES, torch.zeros(7)), _MIDDLES)


def encode(numbers: torch.Tensor) -> torch.Tensor:
    """Round float32 to nearest, ties to even; what is larger than 6 becomes it. Codes, uint8."""
    codes = torch.bucketize(numbers.abs(), _BOUNDS, out_int32=True)
    return torch.where((numbers < 0) & (codes > 0), codes + 8, codes).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The numbers, float32, of uint8 codes."""
    return VALUES[codes.int()]


def doubled(codes: torch.Tensor) -> torch.Tensor:
    """Twice the numbers: integers of 12 at most, int8."""
    return (VALUES * 2).to(torch.int8)[codes.int()]


def scales_of(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two, float32, of exponents as MXFP4 has them (E8M0), uint8; 255 is NaN."""
    powers = torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32) - 127)
    return torch.where(exponents == 255, torch.nan, powers)


def largest_fits(largest: torch.Tensor) -> torch.Tensor:
    """Scales of blocks by their largest magnitudes, as the specification finds them: what is beyond 6 is clipped."""
    _, exponent = torch.frexp(largest)  # largest is in [0.5, 1) * 2 ** exponent
    powers = torch.ldexp(torch.ones_like(largest), (exponent - 1 - _LARGEST_EXPONENT).clamp(min=-126))
    return torch.where(largest == 0, 1.0, torch.where(largest.isfinite(), powers, largest))
