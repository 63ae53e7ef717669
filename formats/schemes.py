"""Quantisation schemes as data: one definition for observers, fake quantisation, conversion, planner and lowerings.

Needs no torch. A matrix [outputs, inputs] is always cut along its inputs, so that packing projections, which stacks
outputs, changes no code.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Literal

from transom.errors import QuantizationError

Format = Literal["int4", "int8", "float8_e4m3fn", "sfp8", "float4_e2m1fn"]
"""What a code is: an integer; an 8-bit float (E4M3 without infinities: OCP 8-bit Floating Point Specification 1.0); a
switched 8-bit float (`formats.sfp8`); or a 4-bit float (`formats.float4`)."""

BITS: dict[str, int] = {"int4": 4, "int8": 8, "float8_e4m3fn": 8, "sfp8": 8, "float4_e2m1fn": 4}

SMALLEST_BLOCK = 16
"""Runtimes take powers of two from here on."""

LARGEST_BLOCK = 128
"""Columns of a stored block, at most: a scale for more columns is repeated, which changes no number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a matrix becomes narrow numbers: `(code - zero_point) * scale + offset`.

    Attributes:
        format: What a code is.
        block: Columns that share a scale, at most (see `group`); or all of a "row" (an output channel), or of the
            whole "tensor".
        symmetric: Whether the middle code means zero; otherwise each block has a zero point. Floats have none.
        has_offsets: Whether each block has an offset, which any number can be: what its middle code means, as the
            minima of llama.cpp's Q4_1 state it. Codes with offsets are kept where a checkpoint has them; nothing is
            rounded to such a grid.
        signed_scale: Whether a scale may be negative, so that the lowest code of an integer always stands for the
            number of largest magnitude: the grid of llama.cpp's Q4_0. Otherwise scales are positive.
        scale_dtype: What every scale can be rounded to without a change; scales are held in float32.
        modules: Pattern that is found in the names of the weights that this is for.
    """

    format: Format
    block: int | Literal["row", "tensor"]
    symmetric: bool = True
    has_offsets: bool = False
    signed_scale: bool = False
    scale_dtype: Literal["float32", "float16", "bfloat16", "float8_e8m0fnu"] = "float32"
    modules: str = ""

    def __post_init__(self) -> None:
        if self.format not in BITS:
            raise QuantizationError(f"unknown format {self.format!r}: choose one of {', '.join(BITS)}")
        if isinstance(self.block, int) and (self.block < SMALLEST_BLOCK or self.block & (self.block - 1)):
            raise QuantizationError(f"blocks must be powers of two from {SMALLEST_BLOCK} on, not {self.block}")
        if not (self.is_integer or self.symmetric):
            raise QuantizationError(f"{self.format} has no zero points: make it symmetric")
        if self.has_offsets and not (self.is_integer and self.symmetric):
            raise QuantizationError("only integers that have no zero points have offsets")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.format]

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers."""
        return self.format in ("int4", "int8")

    def group(self, columns: int) -> int:
        """Columns that share a scale; a block is halved until it divides the columns.

        Raises:
            QuantizationError: If not even the smallest block does.
        """
        return columns if isinstance(self.block, str) else _dividing(columns, self.block)

    def stored_block(self, columns: int) -> int:
        """Columns of a stored block, which has its own copy of the group's scale.

        Raises:
            QuantizationError: If no block of `SMALLEST_BLOCK` or more divides the columns.
        """
        return _dividing(columns, LARGEST_BLOCK if isinstance(self.block, str) else min(self.block, LARGEST_BLOCK))

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix [rows, columns]: codes, float32 scales and offsets, and zero points packed like codes."""
        blocks = columns // self.stored_block(columns)
        zeros = 4 * blocks if self.has_offsets else 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (columns * self.bits // 8 + 4 * blocks + zeros)

    @property
    def key(self) -> str:
        """All but `modules` in a line, which `of_key` reads; operations carry it as an argument."""
        offsets = [True] if self.has_offsets else []
        return json.dumps([self.format, self.block, self.symmetric, self.signed_scale, self.scale_dtype, *offsets])

    @staticmethod
    def of_key(key: str) -> QuantSpec:
        """Undo `key`."""
        format, block, symmetric, signed_scale, scale_dtype, *offsets = json.loads(key)
        return QuantSpec(
            format=format,
            block=block,
            symmetric=symmetric,
            has_offsets=offsets == [True],
            signed_scale=signed_scale,
            scale_dtype=scale_dtype,
        )

    def describe(self) -> str:
        """In words, such as "int4 in blocks of 32"."""
        where = f"by {self.block}" if isinstance(self.block, str) else f"in blocks of {self.block}"
        zeros = " with offsets" if self.has_offsets else "" if self.symmetric else " with zero points"
        return f"{self.format} {where}{zeros}"


def _dividing(columns: int, block: int) -> int:
    while columns % block:
        block //= 2
        if block < SMALLEST_BLOCK:
            raise QuantizationError(f"{columns} columns cannot be cut into blocks of {SMALLEST_BLOCK} or more")
    return block


def is_table(name: str) -> bool:
    """Whether a weight is the table of tokens, or a head that is not tied to it."""
    return "embed_tokens" in name or "lm_head" in name


def is_router(name: str) -> bool:
    """Whether a weight chooses experts: it is small, and what it rounds away are other experts."""
    return re.search(r"(^|\.)router\.", name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """Quantisation of a model.

    Attributes:
        name: What users call it.
        linears: Of the projections: the first whose `modules` fits is taken, those that none fits stay as they are, and
            so do routers.
        table: Of the embedding and the head; None keeps it as it is.
        activations: How what goes into quantised projections is rounded, with one scale a tensor that observers
            measured; None: not at all.
        as_shipped: Whether a weight that its checkpoint holds as codes keeps that grid, whatever `linears` and
            `table` say.
    """

    name: str
    linears: tuple[QuantSpec, ...] = ()
    table: QuantSpec | None = None
    activations: Format | None = None
    as_shipped: bool = False

    def of(self, name: str) -> QuantSpec | None:
        """What becomes of the weight of this name."""
        if is_table(name):
            return self.table
        if is_router(name):
            return None
        return next((spec for spec in self.linears if re.search(spec.modules, name)), None)

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """Every spec that some weight may have."""
        return (*self.linears, *((self.table,) if self.table else ()))

    @property
    def formats(self) -> frozenset[str]:
        """Every format that a target must hold for it."""
        return frozenset(spec.format for spec in self.specs) | ({self.activations} if self.activations else set())


SPECS: dict[str, QuantSpec] = {
    # llama.cpp's Q4_0, to the bit.
    "int4_block32": QuantSpec(format="int4", block=32, signed_scale=True, scale_dtype="float16"),
    "int4_block128": QuantSpec(format="int4", block=128),
    "int4_channel": QuantSpec(format="int4", block="row"),
    "int8_block32": QuantSpec(format="int8", block=32),
    "int8_block128": QuantSpec(format="int8", block=128),
    "int8_channel": QuantSpec(format="int8", block="row"),
    "fp8_e4m3": QuantSpec(format="float8_e4m3fn", block=128),
    "sfp8": QuantSpec(format="sfp8", block="tensor"),
    # What TensorRT takes to the bit: its scales are of the dtype that it computes in, and positive.
    "int4_block32_bf16": QuantSpec(format="int4", block=32, scale_dtype="bfloat16"),
    "fp8_channel": QuantSpec(format="float8_e4m3fn", block="row", scale_dtype="bfloat16"),
}
"""What projections and tables can be, by name; a scheme may be written LINEARS:TABLE with two of these names."""

# Every token pays for the whole head. Blocks of 128 make it a fifth faster than blocks of 32, and on the 270M the
# perplexity is the same to 0.03%.
_TABLE = SPECS["int8_block128"]
# Queries, keys and values are a sixth of the projections and the most sensitive part: on the 270M they cause a third
# of what 4 bits everywhere lose in perplexity.
_INTO_ATTENTION = dataclasses.replace(SPECS["int8_block32"], modules=r"self_attn\.(q|k|v|qkv)_proj")
_INT4 = QuantSpec(format="int4", block=32, symmetric=False)
_OWN_TABLE = ("sfp8", "int4_block32_bf16", "fp8_channel")
_FP8 = SPECS["fp8_channel"]
MXFP4 = QuantSpec(format="float4_e2m1fn", block=32, scale_dtype="float8_e8m0fnu")
_ATTENTION = dataclasses.replace(SPECS["int8_block32"], modules=r"self_attn\.")

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="none"),
        Scheme(name="int8", linears=(SPECS["int8_block32"],), table=_TABLE),
        Scheme(name="int4", linears=(_INTO_ATTENTION, _INT4), table=_TABLE),
        # The smallest: worth it where the table is most of the model and memory is what counts.
        Scheme(
            name="int4_table",
            linears=(_INTO_ATTENTION, _INT4),
            table=QuantSpec(format="int4", block=32),
        ),
        Scheme(name="fp8", linears=(SPECS["fp8_e4m3"],), table=_TABLE),
        Scheme(name="fp8_activations", linears=(SPECS["fp8_e4m3"],), table=_TABLE, activations="float8_e4m3fn"),
        Scheme(name="fp8_channel_activations", linears=(_FP8,), table=_FP8, activations="float8_e4m3fn"),
        # As gpt-oss is released: attention is finer.
        Scheme(name="mxfp4", linears=(_ATTENTION, MXFP4), table=_TABLE),
        # Weights that a GGUF file holds as codes stay what they are; others come as near as 8 bits can.
        Scheme(name="as_shipped", linears=(SPECS["int8_block32"],), table=SPECS["int8_block32"], as_shipped=True),
        *(
            Scheme(name=name, linears=(spec,), table=spec if name in _OWN_TABLE else _TABLE)
            for name, spec in SPECS.items()
        ),
    )
}


def scheme(name: str) -> Scheme:
    """Look a scheme up: a name of `SCHEMES`, or LINEARS:TABLE with names of `SPECS` or "none".

    Raises:
        QuantizationError: If there is no scheme of that name.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    linears, colon, table = name.partition(":")
    if not colon:
        raise QuantizationError(f"no quantisation scheme named {name!r}: choose one of {', '.join(SCHEMES)}")
    for part in (linears, table):
        if part not in (*SPECS, "none"):
            raise QuantizationError(
                f"{name!r} is no quantisation scheme: on either side of the colon stands none or one of "
                f"{', '.join(SPECS)}, not {part!r}"
            )
    return Scheme(
        name=name,
        linears=() if linears == "none" else (SPECS[linears],),
        table=None if table == "none" else SPECS[table],
    )
