"""Products with codes, rows of a table of codes, and rounded activations."""

from __future__ import annotations

from typing import Any

import torch

from transom.formats.quantized import block_of, dequantize
from transom.formats.rounding import FLOAT8, FLOAT8_MAX
from transom.graphs.ops.operation import operation


@operation
def linear_quantized(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str
) -> torch.Tensor:
    """`x @ dequantize(codes).T`; see `formats.quantized` for the layout of codes, zero points and offsets."""
    return torch.nn.functional.linear(x, dequantize(codes, scales, zeros, format).to(x.dtype))


@linear_quantized.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@operation
def embedding_quantized(
    tokens: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str
) -> torch.Tensor:
    """Rows of the dequantised table, float32 [..., K]."""
    flat = tokens.flatten()
    rows = dequantize(codes[flat], scales[flat], None if zeros is None else zeros[flat], format)
    return rows.view(*tokens.shape, -1)


@embedding_quantized.register_fake
def _(tokens: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, _: Any, format: str) -> torch.Tensor:
    return scales.new_empty((*tokens.shape, codes.shape[1] * block_of(codes, format)))


@operation
def round_activations(x: torch.Tensor, scale: float, format: str) -> torch.Tensor:
    """Round activations to 8-bit floats and back: `x / scale` to the nearest of them, what is out of range clamped."""
    if format != "float8_e4m3fn":
        raise ValueError(f"activations are rounded to float8_e4m3fn, not to {format!r}")
    narrow = (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return (narrow.float() * scale).to(x.dtype)


@round_activations.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


LINEAR_QUANTIZED = torch.ops.transom.linear_quantized.default
EMBEDDING_QUANTIZED = torch.ops.transom.embedding_quantized.default
ROUND_ACTIVATIONS = torch.ops.transom.round_activations.default
