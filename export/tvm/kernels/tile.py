"""How wide kernels are: numbers that fit the vector registers of a processor."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Sizes of the innermost loops.

    Attributes:
        registers: Vector registers.
        lanes: float32 numbers in one vector register.
        rows: Rows of activations that a matrix product holds in registers.
        vectors: Registers along the columns of the product; `rows * vectors` of them accumulate.
    """

    registers: int
    lanes: int
    rows: int
    vectors: int


AVX512 = Tile(registers=32, lanes=16, rows=8, vectors=2)
AVX2 = Tile(registers=16, lanes=8, rows=4, vectors=2)
NEON = Tile(registers=32, lanes=4, rows=6, vectors=3)
SSE = Tile(registers=16, lanes=4, rows=4, vectors=2)


def divisor(size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `size`."""
    power = 1
    while power * 2 <= limit and size % (power * 2) == 0:
        power *= 2
    return power


def part(size: int, limit: int, step: int) -> int:
    """The largest divisor of `size` up to `limit` that is a multiple of `step`, which divides `size`."""
    return max(step * count for count in range(1, max(limit // step, 1) + 1) if (size // step) % count == 0)
