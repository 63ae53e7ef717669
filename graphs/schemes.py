"""Quantisation schemes as data: one definition for the pass, the planner and every lowering. Imports nothing."""

from __future__ import annotations

import dataclasses

from transom.graphs.errors import QuantizationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How a matrix is cut into blocks of integers.

    Attributes:
        bits: 4 or 8.
        block: Columns that share a scale.
        symmetric: Whether the middle code means zero; otherwise each block has a zero point.
    """

    bits: int
    block: int
    symmetric: bool

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix [rows, columns]: codes, float32 scales, and zero points packed like codes."""
        blocks = -(-columns // self.block)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (columns * self.bits // 8 + 4 * blocks + zero_points)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Weight-only quantisation of a model.

    Attributes:
        name: What users call it.
        linear: Format of the projections; None keeps them as they are.
        embedding: Format of the embedding and the head, which share one buffer.
    """

    name: str
    linear: BlockFormat | None
    embedding: BlockFormat | None


_INT8 = BlockFormat(bits=8, block=32, symmetric=True)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="none", linear=None, embedding=None),
        Scheme(name="int8", linear=_INT8, embedding=_INT8),
        Scheme(name="int4", linear=BlockFormat(bits=4, block=32, symmetric=False), embedding=_INT8),
    )
}


def scheme(name: str) -> Scheme:
    """Look a scheme up.

    Raises:
        QuantizationError: If there is no scheme of that name.
    """
    if name not in SCHEMES:
        raise QuantizationError(f"no quantisation scheme named {name!r}: choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
