"""The inner part of every product with many rows: activations times a panel of weights, transposed and in float32.

A panel holds some columns of the result, for up to `PANEL_DEPTH` columns of x. It is made once for all rows, so weights
may be stored in any form.
"""

from __future__ import annotations

from tvm.script import tirx as T

from transom.export.tvm.kernels.tile import Tile, divisor, part

PANEL_DEPTH = 2048
"""With it, a panel of 32 columns takes 256 KiB: it stays in a core's second cache."""


def panel_shape(n: int, tile: Tile) -> tuple[int, int]:
    """Vectors, and lanes in each, that make up a panel's columns, for a product with `n` columns."""
    width = divisor(n, tile.lanes * tile.vectors)
    lanes = min(width, tile.lanes)
    return width // lanes, lanes


def panel_depth(k: int, step: int) -> int:
    """Rows of a panel, for a product with `k` columns of x that come in groups of `step`."""
    depth = part(k, PANEL_DEPTH, step)
    # Every panel reads and writes the results once, which many low ones may not.
    return depth if 8 * depth >= min(k, PANEL_DEPTH) else k


@T.inline
def multiply_panel(X, panel, Y, m, column, layer, depth, rows, vectors, lanes):  # type: ignore[no-untyped-def]
    """Add `X[:, layer] @ panel` to one panel's columns of Y; the first layer sets them."""
    for block in T.serial((m + rows - 1) // rows):
        total = T.alloc_buffer((rows * vectors, lanes), "float32", scope="local")
        for row in T.unroll(rows):
            for vector in T.unroll(vectors):
                for lane in T.vectorized(lanes):
                    total[row * vectors + vector, lane] = T.float32(0)
        for step in T.serial(depth):
            for row in T.unroll(rows):
                for vector in T.unroll(vectors):
                    for lane in T.vectorized(lanes):
                        total[row * vectors + vector, lane] = (
                            total[row * vectors + vector, lane]
                            # Rows beyond the last repeat it, and are not stored.
                            + X[T.min(block * rows + row, m - 1), layer * depth + step]
                            * panel[step, vector * lanes + lane]
                        )
        for row in T.unroll(rows):
            if block * rows + row < m:
                for vector in T.unroll(vectors):
                    if layer == 0:
                        for lane in T.vectorized(lanes):
                            Y[block * rows + row, (column * vectors + vector) * lanes + lane] = total[
                                row * vectors + vector, lane
                            ]
                    else:
                        for lane in T.vectorized(lanes):
                            Y[block * rows + row, (column * vectors + vector) * lanes + lane] = (
                                Y[block * rows + row, (column * vectors + vector) * lanes + lane]
                                + total[row * vectors + vector, lane]
                            )
