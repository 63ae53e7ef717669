"""Products with block-quantised weights, and rows of block-quantised tables; `formats.quantized` has the layout.

Axes: M rows, N columns of the result, K columns of x, G blocks of a row, B codes of a block. Codes become float32 on
the way into the multiplication: activations are never rounded.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from transom.export.tvm.kernels.arithmetic import lane_sum
from transom.export.tvm.kernels.matmul import multiply_panel, panel_depth, panel_shape
from transom.export.tvm.kernels.tile import Tile, divisor
from transom.formats.schemes import BITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
    """A quantised matrix.

    Attributes:
        n: Rows of the matrix.
        blocks: Blocks of a row.
        block: Codes of a block.
        format: What a code is; see `formats.schemes.Format`.
        symmetric: Whether the middle code is subtracted; otherwise there are zero points.
        has_offsets: Whether every block has an offset, which is added.
    """

    n: int
    blocks: int
    block: int
    format: str
    symmetric: bool
    has_offsets: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.format]

    @property
    def k(self) -> int:
        """Columns of the matrix."""
        return self.blocks * self.block

    @property
    def bytes(self) -> int:
        """Bytes of a block's codes."""
        return self.block * self.bits // 8

    @property
    def zeros(self) -> tuple[int, ...]:
        """Shape of zero points or offsets; without them, kernels are called with the codes once more in their place."""
        if self.has_offsets:
            return self.n, self.blocks
        if self.symmetric:
            return self.n, self.blocks, self.bytes
        return self.n, -(-self.blocks * self.bits // 8)

    @property
    def zeros_dtype(self) -> str:
        """Dtype of zero points or offsets."""
        return "float32" if self.has_offsets else "uint8"

    def number_of(self, code: Any, scales: Any, zeros: Any, row: Any, block: Any) -> Any:
        """What a code, given as float32, means."""
        number = (code - self.zero(zeros, row, block)) * scales[row, block]
        return number + zeros[row, block] if self.has_offsets else number

    def zero(self, zeros: Any, row: Any, block: Any) -> Any:
        """What is subtracted from codes, float32; `zeros` may be anything if there are no zero points."""
        if self.format not in ("int4", "int8"):
            return T.float32(0)
        if self.symmetric:
            return T.float32(2 ** (self.bits - 1))
        if self.bits == 8:
            return T.Cast("float32", zeros[row, block])
        shift = T.Cast("uint8", (block % 2) * 4)
        return T.Cast("float32", (zeros[row, block // 2] >> shift) & T.uint8(15))


def low(codes: Codes, code: Any) -> Any:
    """The even column of a byte of 4-bit codes, float32."""
    return half(codes, T.Cast("int32", code & T.uint8(15)))


def high(codes: Codes, code: Any) -> Any:
    """The odd column of a byte of 4-bit codes, float32."""
    return half(codes, T.Cast("int32", code >> T.uint8(4)))


def half(codes: Codes, wide: Any) -> Any:
    """A 4-bit code, float32."""
    if codes.format == "int4":
        return T.Cast("float32", wide)
    # The bits of a float32 whose exponent is not biased yet.
    return (
        T.reinterpret("float32", (wide & 7) << 22)
        * T.float32(2.0**126)
        * T.Select(wide >= 8, T.float32(-1), T.float32(1))
    )


def whole(codes: Codes, code: Any) -> Any:
    """An 8-bit code, float32."""
    wide = T.Cast("int32", code)
    if codes.format == "int8":
        return T.Cast("float32", wide)
    # The bits of a float32 whose exponent is not biased yet, or not by as much.
    low_bits, sign = wide & 127, T.Select(wide >= 128, T.float32(-1), T.float32(1))
    if codes.format == "float8_e4m3fn":
        return T.reinterpret("float32", low_bits << 20) * T.float32(2.0**120) * sign
    large = T.reinterpret("float32", (low_bits << 20) + (112 << 23))
    small = T.reinterpret("float32", (low_bits << 21) + (104 << 23))
    return T.Select(low_bits >= 64, large, T.Select(low_bits == 0, T.float32(0), small)) * sign


def vector_product(codes: Codes, tile: Tile) -> Any:
    """X [1, K], codes uint8 [N, G, bytes], scales [N, G], zeros (see `Codes.zeros`) -> Y [1, N]."""
    return _halves_product(codes, tile) if codes.bits == 4 else _bytes_product(codes, tile)


def _bytes_product(codes: Codes, tile: Tile) -> Any:
    n, k, blocks, block, zeros = codes.n, codes.k, codes.blocks, codes.block, codes.zeros
    # One row at a time: four took a third longer, as each then reads memory in another place.
    rows, lanes = 1, divisor(block, tile.lanes)
    steps = block // lanes

    @T.prim_func(private=True, s_tir=True)
    def linear_bytes_row(x: T.handle, c: T.handle, s: T.handle, z: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        X = T.match_buffer(x, (1, k), "float32")
        C = T.match_buffer(c, (n, blocks, block), "uint8")
        S = T.match_buffer(s, (n, blocks), "float32")
        Z = T.match_buffer(z, zeros, codes.zeros_dtype)
        Y = T.match_buffer(y, (1, n), "float32")
        if codes.has_offsets:
            # Of every block of X, by lanes: what its offset is multiplied by.
            sums = T.alloc_buffer((blocks, lanes), "float32", scope="global")
            for part_ in T.serial(blocks):
                for lane in T.vectorized(lanes):
                    sums[part_, lane] = T.float32(0)
                for step in T.serial(steps):
                    for lane in T.vectorized(lanes):
                        sums[part_, lane] = sums[part_, lane] + X[0, part_ * block + step * lanes + lane]
        for group in T.parallel(n // rows):
            total = T.alloc_buffer((rows, lanes), "float32", scope="local")
            inner = T.alloc_buffer((rows, lanes), "float32", scope="local")
            for row in T.unroll(rows):
                for lane in T.vectorized(lanes):
                    total[row, lane] = T.float32(0)
            for part_ in T.serial(blocks):
                for row in T.unroll(rows):
                    for lane in T.vectorized(lanes):
                        inner[row, lane] = T.float32(0)
                for step in T.unroll(steps):
                    for row in T.unroll(rows):
                        for lane in T.vectorized(lanes):
                            inner[row, lane] = inner[row, lane] + X[0, part_ * block + step * lanes + lane] * (
                                whole(codes, C[group * rows + row, part_, step * lanes + lane])
                                - codes.zero(Z, group * rows + row, part_)
                            )
                for row in T.unroll(rows):
                    for lane in T.vectorized(lanes):
                        total[row, lane] = total[row, lane] + inner[row, lane] * S[group * rows + row, part_]
                if codes.has_offsets:
                    for row in T.unroll(rows):
                        for lane in T.vectorized(lanes):
                            total[row, lane] = total[row, lane] + sums[part_, lane] * Z[group * rows + row, part_]
            for row in T.unroll(rows):
                Y[0, group * rows + row] = lane_sum(total, row, lanes)

    return linear_bytes_row


def _halves_product(codes: Codes, tile: Tile) -> Any:
    n, k, blocks, size, zeros = codes.n, codes.k, codes.blocks, codes.bytes, codes.zeros
    rows, lanes = divisor(n, 4), divisor(size, tile.lanes)
    steps = size // lanes

    @T.prim_func(private=True, s_tir=True)
    def linear_halves_row(x: T.handle, c: T.handle, s: T.handle, z: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        X = T.match_buffer(x, (1, k), "float32")
        C = T.match_buffer(c, (n, blocks, size), "uint8")
        S = T.match_buffer(s, (n, blocks), "float32")
        Z = T.match_buffer(z, zeros, codes.zeros_dtype)
        Y = T.match_buffer(y, (1, n), "float32")
        # Even and odd columns apart, as the two halves of a byte need them.
        even = T.alloc_buffer((k // 2,), "float32", scope="global")
        odd = T.alloc_buffer((k // 2,), "float32", scope="global")
        for column in T.serial(k // 2):
            even[column] = X[0, column * 2]
            odd[column] = X[0, column * 2 + 1]
        if codes.has_offsets:
            # Of every block of X, by lanes: what its offset is multiplied by.
            sums = T.alloc_buffer((blocks, lanes), "float32", scope="global")
            for part_ in T.serial(blocks):
                for lane in T.vectorized(lanes):
                    sums[part_, lane] = T.float32(0)
                for step in T.serial(steps):
                    for lane in T.vectorized(lanes):
                        sums[part_, lane] = sums[part_, lane] + (
                            even[part_ * size + step * lanes + lane] + odd[part_ * size + step * lanes + lane]
                        )
        for group in T.parallel(n // rows):
            total = T.alloc_buffer((rows, lanes), "float32", scope="local")
            inner = T.alloc_buffer((rows, lanes), "float32", scope="local")
            for row in T.unroll(rows):
                for lane in T.vectorized(lanes):
                    total[row, lane] = T.float32(0)
            for part_ in T.serial(blocks):
                for row in T.unroll(rows):
                    for lane in T.vectorized(lanes):
                        inner[row, lane] = T.float32(0)
                for step in T.unroll(steps):
                    for row in T.unroll(rows):
                        for lane in T.vectorized(lanes):
                            inner[row, lane] = (
                                inner[row, lane]
                                + even[part_ * size + step * lanes + lane]
                                * (
                                    low(codes, C[group * rows + row, part_, step * lanes + lane])
                                    - codes.zero(Z, group * rows + row, part_)
                                )
                                + odd[part_ * size + step * lanes + lane]
                                * (
                                    high(codes, C[group * rows + row, part_, step * lanes + lane])
                                    - codes.zero(Z, group * rows + row, part_)
                                )
                            )
                for row in T.unroll(rows):
                    for lane in T.vectorized(lanes):
                        total[row, lane] = total[row, lane] + inner[row, lane] * S[group * rows + row, part_]
                if codes.has_offsets:
                    for row in T.unroll(rows):
                        for lane in T.vectorized(lanes):
                            total[row, lane] = total[row, lane] + sums[part_, lane] * Z[group * rows + row, part_]
            for row in T.unroll(rows):
                Y[0, group * rows + row] = lane_sum(total, row, lanes)

    return linear_halves_row


@T.inline
def unpack_block(codes, C, S, Z, row, block, out, out_row, out_column):  # type: ignore[no-untyped-def]
    """Numbers of one block, into `out[out_row, out_column:]`."""
    if codes.bits == 8:
        for column in T.vectorized(codes.block):
            out[out_row, out_column + column] = codes.number_of(whole(codes, C[row, block, column]), S, Z, row, block)
    else:
        for column in T.vectorized(codes.bytes):
            out[out_row, out_column + column * 2] = codes.number_of(low(codes, C[row, block, column]), S, Z, row, block)
            out[out_row, out_column + column * 2 + 1] = codes.number_of(
                high(codes, C[row, block, column]), S, Z, row, block
            )


def matrix_product(codes: Codes, tile: Tile) -> Any:
    """X [M, K], codes uint8 [N, G, bytes], scales [N, G], zeros (see `Codes.zeros`) -> Y [M, N]."""
    n, k, blocks, block, size, zeros = codes.n, codes.k, codes.blocks, codes.block, codes.bytes, codes.zeros
    vectors, lanes = panel_shape(n, tile)
    width, rows = vectors * lanes, tile.rows
    depth = panel_depth(k, block)
    layer_blocks = depth // block

    @T.prim_func(private=True, s_tir=True)
    def linear_codes_rows(x: T.handle, c: T.handle, s: T.handle, z: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, k), "float32")
        C = T.match_buffer(c, (n, blocks, size), "uint8")
        S = T.match_buffer(s, (n, blocks), "float32")
        Z = T.match_buffer(z, zeros, codes.zeros_dtype)
        Y = T.match_buffer(y, (m, n), "float32")
        for column in T.parallel(n // width):
            panel = T.alloc_buffer((depth, width), "float32", scope="global")
            numbers = T.alloc_buffer((width, block), "float32", scope="global")
            for layer in T.serial(k // depth):
                for part_ in T.serial(layer_blocks):
                    for row in T.serial(width):
                        unpack_block(
                            codes, C, S, Z, column * width + row, layer * layer_blocks + part_, numbers, row, 0
                        )
                    for step in T.serial(block):
                        for row in T.vectorized(width):
                            panel[part_ * block + step, row] = numbers[row, step]
                multiply_panel(X, panel, Y, m, column, layer, depth, rows, vectors, lanes)

    return linear_codes_rows


def table_rows(codes: Codes) -> Any:
    """Tokens int64 [M], codes uint8 [N, G, bytes], scales [N, G], zeros (see `Codes.zeros`) -> rows [M, K]."""
    n, k, blocks, block, size, zeros = codes.n, codes.k, codes.blocks, codes.block, codes.bytes, codes.zeros

    @T.prim_func(private=True, s_tir=True)
    def embedding_codes(tokens: T.handle, c: T.handle, s: T.handle, z: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        tokens_M = T.match_buffer(tokens, (m,), "int64")
        C = T.match_buffer(c, (n, blocks, size), "uint8")
        S = T.match_buffer(s, (n, blocks), "float32")
        Z = T.match_buffer(z, zeros, codes.zeros_dtype)
        Y = T.match_buffer(y, (m, k), "float32")
        for row in T.serial(m):
            for part_ in T.serial(blocks):
                unpack_block(codes, C, S, Z, tokens_M[row], part_, Y, row, part_ * block)

    return embedding_codes
