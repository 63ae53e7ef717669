"""Block-quantised matrices: the layout, and how codes become numbers again.

A matrix [R, K] is cut into blocks of `block` columns. It is held as

    codes        uint8 [R, K / block, block * bits / 8]   two 4-bit codes a byte, the even column in the low half;
                                                          or float8_e4m3fn [R, K / block, block]
    scales       float32 [R, K / block]
    zero_points  uint8 [R, ceil(K / block * bits / 8)]    packed like the codes; None: the middle code 2 ** (bits - 1),
                                                          and 0 for floats

and means `(code - zero_point) * scale`. This is the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., n] into bytes [..., ceil(n * bits / 8)]."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undo `pack`: uint8 codes [..., count]."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Numbers of a block-quantised matrix, float32 [R, K]."""
    rows, blocks = scales.shape
    block = codes.shape[2] * 8 // bits
    values = unpack(codes, bits, block).float()
    if not codes.is_floating_point():
        middle = 2 ** (bits - 1) if zero_points is None else unpack(zero_points, bits, blocks).float()[..., None]
        values = values - middle
    return (values * scales[..., None]).view(rows, blocks * block)
