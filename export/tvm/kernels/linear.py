"""`x @ weight.T` with float32 weights [N, K], in their own layout: one row, or a symbolic number M of rows.

Axes: M rows, N columns of the result, K columns of x.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from transom.export.tvm.kernels.arithmetic import lane_sum
from transom.export.tvm.kernels.matmul import multiply_panel, panel_depth, panel_shape
from transom.export.tvm.kernels.tile import Tile, divisor

STREAM_BYTES = 8 * 2**20
"""Matrices beyond this come from memory, not from a cache: then one row at a time reads fastest."""


def vector_product(n: int, k: int, tile: Tile) -> Any:
    """X [1, K], W [N, K] -> Y [1, N]."""
    streamed = n * k * 4 > STREAM_BYTES
    rows = 1 if streamed else divisor(n, 8)
    lanes = divisor(k, 4 * tile.lanes if streamed else tile.lanes)
    steps = k // lanes

    @T.prim_func(private=True, s_tir=True)
    def linear_row(x: T.handle, w: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        X = T.match_buffer(x, (1, k), "float32")
        W = T.match_buffer(w, (n, k), "float32")
        Y = T.match_buffer(y, (1, n), "float32")
        for group in T.parallel(n // rows):
            total = T.alloc_buffer((rows, lanes), "float32", scope="local")
            for row in T.unroll(rows):
                for lane in T.vectorized(lanes):
                    total[row, lane] = T.float32(0)
            for step in T.serial(steps):
                for row in T.unroll(rows):
                    for lane in T.vectorized(lanes):
                        total[row, lane] = (
                            total[row, lane] + X[0, step * lanes + lane] * W[group * rows + row, step * lanes + lane]
                        )
            for row in T.unroll(rows):
                Y[0, group * rows + row] = lane_sum(total, row, lanes)

    return linear_row


def matrix_product(n: int, k: int, tile: Tile) -> Any:
    """X [M, K], W [N, K] -> Y [M, N]."""
    vectors, lanes = panel_shape(n, tile)
    width, rows = vectors * lanes, tile.rows
    strip = divisor(k, 16)
    depth = panel_depth(k, strip)

    @T.prim_func(private=True, s_tir=True)
    def linear_rows(x: T.handle, w: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, k), "float32")
        W = T.match_buffer(w, (n, k), "float32")
        Y = T.match_buffer(y, (m, n), "float32")
        for column in T.parallel(n // width):
            panel = T.alloc_buffer((depth, width), "float32", scope="global")
            for layer in T.serial(k // depth):
                for low in T.serial(depth // strip):
                    for row in T.serial(width):
                        for step in T.unroll(strip):
                            panel[low * strip + step, row] = W[column * width + row, layer * depth + low * strip + step]
                multiply_panel(X, panel, Y, m, column, layer, depth, rows, vectors, lanes)

    return linear_rows
