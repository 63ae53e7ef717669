"""SFP8, the switched 8-bit float of gemma.cpp: three bits of mantissa for large numbers, two for small ones.

Bit 7 is the sign; of the low seven, v:

    v >= 64    (1 + m / 8) * 2 ** ((v >> 3) - 15), m the low three bits
    v < 64     (1 + m / 4) * 2 ** ((v >> 2) - 23), m the low two bits
    v == 0     0; with the sign bit it is reserved

There are no infinities, no NaN and no subnormals: 255 numbers from 1.25 * 2 ** -23 to 1.875. Every one of them is
exact in bfloat16. Source: gemma.cpp's `compression/sfp-inl.h`.
"""

from __future__ import annotations

import torch

LARGEST = 1.875

_SWITCH = 0.007568359375
"""From here on a number is rounded to three bits of mantissa: what lies above rounds up to 2 ** -7."""


def encode(numbers: torch.Tensor) -> torch.Tensor:
    """Round to nearest, ties to even.

    Args:
        numbers: float32 of magnitude `LARGEST` at most; larger ones become the largest.

    Returns:
        Codes, uint8.
    """
    size = numbers.abs().clamp(max=LARGEST)
    mantissa_bits = torch.where(size >= _SWITCH, 3, 2)
    _, exponent = torch.frexp(size)  # size is in [0.5, 1) * 2 ** exponent
    step = torch.ldexp(torch.ones_like(size), exponent - 1 - mantissa_bits)
    rounded = torch.round(size / step) * step
    fraction, exponent = torch.frexp(rounded)
    exponent = exponent - 1
    fraction = fraction * 2 - 1
    large = ((exponent + 15) << 3) + torch.round(fraction * 8).to(torch.int32)
    small = ((exponent + 23) << 2) + torch.round(fraction * 4).to(torch.int32)
    code = torch.where(rounded >= 2.0**-7, large, small)
    # The number one step above zero would have the code of zero, so it gives way to its neighbour.
    code = torch.where(rounded >= 2.0**-23, code.clamp(min=1), 0)
    return (code + torch.where((numbers < 0) & (code > 0), 128, 0)).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The numbers, float32, of uint8 codes."""
    wide = codes.to(torch.int32)
    low = wide & 127
    # The bits of a float32: its exponent is biased by 127, its mantissa has 23 bits.
    bits = torch.where(low >= 64, (low << 20) + (112 << 23), (low << 21) + (104 << 23))
    size = torch.where(low == 0, 0, bits).view(torch.float32)
    return torch.where(wide >= 128, -size, size)
