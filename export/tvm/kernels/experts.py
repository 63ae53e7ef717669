"""Mixtures of experts: the largest numbers of a row, products with the matrices of chosen experts, and their sum.

Only what is chosen is read and multiplied, token by token.

Axes: M rows (a token and one of its choices), N columns of the result, K columns of x, E experts, C choices of a token.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from transom.export.tvm.kernels.arithmetic import lane_sum
from transom.export.tvm.kernels.quantized import Codes, unpack_block
from transom.export.tvm.kernels.tile import Tile, divisor

_LEAST = -3.4028234663852886e38


def largest(count: int, chosen: int) -> Any:
    """X [M, E] -> its largest numbers [M, C] in their order, and where they stand, int64 [M, C]."""

    @T.prim_func(private=True, s_tir=True)
    def largest_of_rows(x: T.handle, y: T.handle, i: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, count), "float32")
        Y = T.match_buffer(y, (m, chosen), "float32")
        indices = T.match_buffer(i, (m, chosen), "int64")
        for row in T.serial(m):
            left = T.alloc_buffer((count,), "float32", scope="local")
            for column in T.serial(count):
                left[column] = X[row, column]
            for place in T.serial(chosen):
                indices[row, place] = T.int64(0)
                for column in T.serial(count):
                    if left[column] > left[indices[row, place]]:
                        indices[row, place] = T.Cast("int64", column)
                Y[row, place] = left[indices[row, place]]
                left[indices[row, place]] = T.float32(_LEAST)

    return largest_of_rows


def chosen_product(n: int, k: int, count: int, repeat: int, biased: bool, tile: Tile) -> Any:
    """X [M / repeat, K], experts int64 [M], W [E * N, K], bias [E * N] -> Y [M, N].

    Without a bias, the weight stands in its place.
    """
    lanes = divisor(k, tile.lanes)
    bias = (count * n,) if biased else (count * n, k)

    @T.prim_func(private=True, s_tir=True)
    def chosen_rows(x: T.handle, e: T.handle, w: T.handle, b: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        tokens = T.int64()
        m = T.int64()
        X = T.match_buffer(x, (tokens, k), "float32")
        expert = T.match_buffer(e, (m,), "int64")
        W = T.match_buffer(w, (count * n, k), "float32")
        B = T.match_buffer(b, bias, "float32")
        Y = T.match_buffer(y, (m, n), "float32")
        for column in T.parallel(n):
            for row in T.serial(m):
                total = T.alloc_buffer((1, lanes), "float32", scope="local")
                for lane in T.vectorized(lanes):
                    total[0, lane] = T.float32(0)
                for step in T.serial(k // lanes):
                    for lane in T.vectorized(lanes):
                        total[0, lane] = (
                            total[0, lane]
                            + X[row // repeat, step * lanes + lane] * W[expert[row] * n + column, step * lanes + lane]
                        )
                if biased:
                    Y[row, column] = lane_sum(total, 0, lanes) + B[expert[row] * n + column]
                else:
                    Y[row, column] = lane_sum(total, 0, lanes)

    return chosen_rows


def chosen_codes_product(codes: Codes, n: int, repeat: int, biased: bool, tile: Tile) -> Any:
    """X [M / repeat, K], experts int64 [M], codes uint8 [E * N, G, bytes], scales [E * N, G], zeros, bias -> Y [M, N].

    Without a bias, the scales stand in its place; for zeros see `Codes.zeros`.
    """
    k, blocks, block, size, zeros = codes.k, codes.blocks, codes.block, codes.bytes, codes.zeros
    lanes = divisor(block, tile.lanes)
    bias = (codes.n,) if biased else (codes.n, blocks)

    @T.prim_func(private=True, s_tir=True)
    def chosen_codes_rows(
        x: T.handle, e: T.handle, c: T.handle, s: T.handle, z: T.handle, b: T.handle, y: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        tokens = T.int64()
        m = T.int64()
        X = T.match_buffer(x, (tokens, k), "float32")
        expert = T.match_buffer(e, (m,), "int64")
        C = T.match_buffer(c, (codes.n, blocks, size), "uint8")
        S = T.match_buffer(s, (codes.n, blocks), "float32")
        Z = T.match_buffer(z, zeros, codes.zeros_dtype)
        B = T.match_buffer(b, bias, "float32")
        Y = T.match_buffer(y, (m, n), "float32")
        for column in T.parallel(n):
            for row in T.serial(m):
                numbers = T.alloc_buffer((1, block), "float32", scope="local")
                total = T.alloc_buffer((1, lanes), "float32", scope="local")
                for lane in T.vectorized(lanes):
                    total[0, lane] = T.float32(0)
                for part_ in T.serial(blocks):
                    unpack_block(codes, C, S, Z, expert[row] * n + column, part_, numbers, 0, 0)
                    for step in T.serial(block // lanes):
                        for lane in T.vectorized(lanes):
                            total[0, lane] = (
                                total[0, lane]
                                + X[row // repeat, part_ * block + step * lanes + lane]
                                * numbers[0, step * lanes + lane]
                            )
                if biased:
                    Y[row, column] = lane_sum(total, 0, lanes) + B[expert[row] * n + column]
                else:
                    Y[row, column] = lane_sum(total, 0, lanes)

    return chosen_codes_rows


def weighted_sum(k: int, chosen: int, tile: Tile) -> Any:
    """X [M * C, K], weights [M, C] -> Y [M, K]."""
    lanes = divisor(k, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def weighted_rows(x: T.handle, w: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows = T.int64()
        m = T.int64()
        X = T.match_buffer(x, (rows, k), "float32")
        W = T.match_buffer(w, (m, chosen), "float32")
        Y = T.match_buffer(y, (m, k), "float32")
        for row in T.serial(m):
            for step in T.serial(k // lanes):
                for lane in T.vectorized(lanes):
                    Y[row, step * lanes + lane] = T.float32(0)
                for place in T.serial(chosen):
                    for lane in T.vectorized(lanes):
                        Y[row, step * lanes + lane] = (
                            Y[row, step * lanes + lane] + X[row * chosen + place, step * lanes + lane] * W[row, place]
                        )

    return weighted_rows
