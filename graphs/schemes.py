"""Quantisation schemes as data: one definition for the pass, the planner and every lowering. Needs no torch."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from transom.graphs.errors import QuantizationError

SMALLEST_BLOCK = 16
"""Runtimes take powers of two from here on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How a matrix is cut into blocks of narrow numbers.

    Attributes:
        bits: 4 or 8.
        block: Columns that share a scale, at most; see `fitted`.
        symmetric: Whether the middle code means zero; otherwise each block has a zero point.
        number: What a code is: an integer, or an 8-bit float (E4M3 without infinities: OCP 8-bit Floating Point
            Specification 1.0), which has no zero point.
    """

    bits: int
    block: int
    symmetric: bool
    number: Literal["integer", "float8_e4m3fn"] = "integer"

    def fitted(self, columns: int) -> BlockFormat:
        """This format with the block halved until it divides the columns.

        Raises:
            QuantizationError: If not even the smallest block does.
        """
        block = self.block
        while columns % block:
            block //= 2
            if block < SMALLEST_BLOCK:
                raise QuantizationError(f"{columns} columns cannot be cut into blocks of {SMALLEST_BLOCK} or more")
        return dataclasses.replace(self, block=block)

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix [rows, columns]: codes, float32 scales, and zero points packed like codes."""
        blocks = columns // self.fitted(columns).block
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (columns * self.bits // 8 + 4 * blocks + zero_points)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Weight-only quantisation of a model.

    Attributes:
        name: What users call it.
        linear: Format of the projections; None keeps them as they are.
        embedding: Format of the embedding and the head, which share one buffer.
        exceptions: (pattern, format): linears whose weight's name the pattern is found in have that format instead.
    """

    name: str
    linear: BlockFormat | None
    embedding: BlockFormat | None
    exceptions: tuple[tuple[str, BlockFormat], ...] = ()

    @property
    def has_float8(self) -> bool:
        """Whether any weight becomes 8-bit floats, which not every target can hold."""
        formats = (self.linear, self.embedding, *(fmt for _, fmt in self.exceptions))
        return any(fmt is not None and fmt.number == "float8_e4m3fn" for fmt in formats)

    def of_linear(self, name: str) -> BlockFormat | None:
        """Format of the linear whose weight has this name."""
        found = (fmt for pattern, fmt in self.exceptions if re.search(pattern, name))
        return next(found, self.linear)


_INT8 = BlockFormat(bits=8, block=32, symmetric=True)
# Every token pays for the whole head. Blocks of 128 make it a fifth faster than blocks of 32, and on the 270M the
# perplexity is the same to 0.03%.
_TABLE = BlockFormat(bits=8, block=128, symmetric=True)
_TABLE4 = BlockFormat(bits=4, block=32, symmetric=True)
_INT4 = BlockFormat(bits=4, block=32, symmetric=False)
_FP8 = BlockFormat(bits=8, block=128, symmetric=True, number="float8_e4m3fn")
# Queries, keys and values are a sixth of the projections and the most sensitive part: on the 270M they cause a third
# of what 4 bits everywhere lose in perplexity.
_INTO_ATTENTION = r"self_attn\.(q|k|v|qkv)_proj"

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="none", linear=None, embedding=None),
        Scheme(name="int8", linear=_INT8, embedding=_TABLE),
        Scheme(name="int4", linear=_INT4, embedding=_TABLE, exceptions=((_INTO_ATTENTION, _INT8),)),
        # The smallest: worth it where the table is most of the model and memory is what counts.
        Scheme(name="int4_table", linear=_INT4, embedding=_TABLE4, exceptions=((_INTO_ATTENTION, _INT8),)),
        Scheme(name="fp8", linear=_FP8, embedding=_TABLE),
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
