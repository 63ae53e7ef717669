"""Block-quantised matrices: the layout, and how codes become numbers again.

A matrix [R, K] is cut into blocks of `block` columns. It is held as

    codes        uint8 [R, K / block, block * bits / 8]   two 4-bit codes a byte, the even column in the low half;
                                                          8-bit floats stand in their own dtype, SFP8 as uint8, and
                                                          4-bit ones two a byte
    scales       float32 [R, K / block]
    zero_points  uint8 [R, ceil(K / block * bits / 8)]    packed like the codes; None: the middle code 2 ** (bits - 1),
                                                          and 0 for floats

and means `(code - zero_point) * scale`. This is the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized.
In place of a zero point, a block of integers may have an offset, which is what the middle code means:

    offsets      float32 [R, K / block]                   it means `(code - middle) * scale + offset`
"""

from __future__ import annotations

import torch

from transom.formats import float4, sfp8
from transom.formats.schemes import BITS

ENCODED_FLOATS = {"sfp8": sfp8.decode, "float4_e2m1fn": float4.decode}
"""Numbers of codes that torch has no dtype for, by format."""


def pack(codes: torch.Tensor, format: str) -> torch.Tensor:
    """Pack codes [..., n] into bytes [..., ceil(n * bits / 8)]."""
    if BITS[format] == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, format: str, count: int) -> torch.Tensor:
    """Undo `pack`: codes [..., count]."""
    if BITS[format] == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]


def block_of(codes: torch.Tensor, format: str) -> int:
    """Columns of a block of packed codes [R, K / block, bytes]."""
    return int(codes.shape[2]) * 8 // BITS[format]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str) -> torch.Tensor:
    """Numbers of a block-quantised matrix, float32 [R, K]; `zeros` are zero points, or float32 offsets."""
    rows, blocks = scales.shape
    block = block_of(codes, format)
    if zeros is not None and not zeros.is_floating_point():
        zeros = unpack(zeros, format, blocks)
    return decode(unpack(codes, format, block), scales, zeros, format).view(rows, blocks * block)


def decode(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str) -> torch.Tensor:
    """Numbers of unpacked codes.

    Args:
        codes: [R, G, C].
        scales: float32 [R, G].
        zeros: Zero points, uint8 [R, G]; or offsets, float32 [R, G]; or None.
        format: What a code is.

    Returns:
        float32 [R, G, C].
    """
    if format in ENCODED_FLOATS:
        return ENCODED_FLOATS[format](codes) * scales[..., None]
    values = codes.float()
    has_offsets = zeros is not None and zeros.is_floating_point()
    if not codes.is_floating_point():
        values = values - (2 ** (BITS[format] - 1) if zeros is None or has_offsets else zeros.float()[..., None])
    values = values * scales[..., None]
    return values + zeros[..., None] if zeros is not None and has_offsets else values
