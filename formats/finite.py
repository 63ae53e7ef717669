"""Whether numbers are finite, and where they are not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

SHOWN = 5
"""Rows that an error names."""


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor infinity."""
    if numbers.dtype == torch.float8_e4m3fn:  # has no infinities, and its NaN is all seven bits beside the sign
        return not bool(((numbers.view(torch.uint8) & 127) == 127).any())
    if not numbers.is_floating_point() or not numbers.numel():
        return True
    # NaN and infinity show in the extremes, which take a thirtieth of the time of torch.isfinite.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(numbers))


def nonfinite_rows(blocks: Iterable[torch.Tensor]) -> str:
    """The first rows that hold NaN or infinity, and how many do, in words.

    Args:
        blocks: A tensor in row order, in blocks of any dtype, [rows, ...] each; a scalar is one row.
    """
    rows: list[int] = []
    start = 0
    for block in blocks:
        flat = block.float().reshape(len(block) if block.dim() else 1, -1)
        rows += (start + torch.nonzero(~torch.isfinite(flat).all(1)).flatten()).tolist()
        start += len(flat)
    shown = ", ".join(str(row) for row in itertools.islice(rows, SHOWN))
    if len(rows) <= SHOWN:
        return f"row {shown}" if len(rows) == 1 else f"rows {shown}"
    return f"rows {shown} and {len(rows) - SHOWN:,} more"
