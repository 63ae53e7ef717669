"""What keeps a summary in place of positions, token by token.

All change their summaries in place. A head's state stays in the processor's nearest cache from token to token, so one
token costs one pass over it, and a prompt no more a token than that.

Axes: M new tokens, C channels, W taps, N heads, H numbers of a head, V of its values, G groups of heads, Z numbers of
the state of each.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from transom.export.tvm.kernels.arithmetic import exponential, lane_sum
from transom.export.tvm.kernels.tile import Tile, divisor
from transom.graphs.ops import LEAST_NORM


def row_before(kept: Any, new: Any, start: Any, index: Any, taps: int, column: Any) -> Any:
    """A number of the rows [W - 1 + M] that are kept and new; what was kept is zeros at position 0."""
    old = T.if_then_else(start == 0, T.float32(0), kept[0, T.min(index, taps - 2), column])
    return T.if_then_else(index < taps - 1, old, new[T.max(index - (taps - 1), 0), column])


def causal_convolution(channels: int, taps: int, tile: Tile, *, biased: bool, single: bool) -> Any:
    """X [M, C], kept [1, W - 1, C] in place, start [], weight [C, 1, W], bias [C] -> Y [M, C].

    Args:
        channels: C.
        taps: W.
        tile: Sizes of the innermost loops.
        biased: Whether there is a bias; else the weight stands in its place, and is not read there.
        single: Whether M is 1: waking threads takes longer than one row.
    """
    loop, lanes = T.serial if single else T.parallel, divisor(channels, tile.lanes)
    bias_shape = (channels,) if biased else (channels, 1, taps)

    def first(bias: Any, column: Any) -> Any:
        return bias[column] if biased else T.float32(0)

    @T.prim_func(private=True, s_tir=True)
    def convolve_rows(x: T.handle, k: T.handle, p: T.handle, w: T.handle, b: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, channels), "float32")
        kept = T.match_buffer(k, (1, taps - 1, channels), "float32")
        start = T.match_buffer(p, (), "int64")
        W = T.match_buffer(w, (channels, 1, taps), "float32")
        bias = T.match_buffer(b, bias_shape, "float32")
        Y = T.match_buffer(y, (m, channels), "float32")
        for block in loop(channels // lanes):
            factors = T.alloc_buffer((taps, lanes), "float32", scope="local")
            total = T.alloc_buffer((lanes,), "float32", scope="local")
            for tap in T.unroll(taps):
                for lane in T.unroll(lanes):
                    factors[tap, lane] = W[block * lanes + lane, 0, tap]
            for row in T.serial(m):
                for lane in T.vectorized(lanes):
                    total[lane] = first(bias, block * lanes + lane)
                for tap in T.unroll(taps):
                    for lane in T.vectorized(lanes):
                        total[lane] = (
                            total[lane]
                            + row_before(kept, X, start[()], row + tap, taps, block * lanes + lane) * factors[tap, lane]
                        )
                for lane in T.vectorized(lanes):
                    Y[row, block * lanes + lane] = total[lane]
            # From the first on: what is read stands behind what is written.
            for tap in T.serial(taps - 1):
                for lane in T.vectorized(lanes):
                    kept[0, tap, block * lanes + lane] = row_before(
                        kept, X, start[()], m + tap, taps, block * lanes + lane
                    )

    return convolve_rows


def state_space(heads: int, h: int, groups: int, z: int, tile: Tile) -> Any:
    """X [M, N * H], steps [M, N], rates [N], keys and queries [M, G * Z], skip [N], start [] -> Y [M, N * H].

    The state [1, N, H, Z] stands before the start, and is changed in place.

    Args:
        heads: N.
        h: H.
        groups: G.
        z: Z.
        tile: Sizes of the innermost loops.
    """
    share, lanes = heads // groups, divisor(z, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def scan_rows(
        x: T.handle,
        t: T.handle,
        r: T.handle,
        k: T.handle,
        q: T.handle,
        d: T.handle,
        s: T.handle,
        p: T.handle,
        y: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, heads * h), "float32")
        steps = T.match_buffer(t, (m, heads), "float32")
        rates = T.match_buffer(r, (heads,), "float32")
        keys = T.match_buffer(k, (m, groups * z), "float32")
        queries = T.match_buffer(q, (m, groups * z), "float32")
        skip = T.match_buffer(d, (heads,), "float32")
        state = T.match_buffer(s, (1, heads, h, z), "float32")
        start = T.match_buffer(p, (), "int64")
        Y = T.match_buffer(y, (m, heads * h), "float32")
        for head in T.parallel(heads):
            decay = T.alloc_buffer((1,), "float32", scope="local")
            total = T.alloc_buffer((1, lanes), "float32", scope="local")
            if start[()] == 0:
                for column in T.serial(h):
                    for step in T.serial(z // lanes):
                        for lane in T.vectorized(lanes):
                            state[0, head, column, step * lanes + lane] = T.float32(0)
            for row in T.serial(m):
                decay[0] = exponential(-steps[row, head] * exponential(rates[head]))
                for column in T.serial(h):
                    for lane in T.vectorized(lanes):
                        total[0, lane] = T.float32(0)
                    for step in T.serial(z // lanes):
                        for lane in T.vectorized(lanes):
                            state[0, head, column, step * lanes + lane] = (
                                state[0, head, column, step * lanes + lane] * decay[0]
                                + X[row, head * h + column]
                                * steps[row, head]
                                * keys[row, head // share * z + step * lanes + lane]
                            )
                        for lane in T.vectorized(lanes):
                            total[0, lane] = (
                                total[0, lane]
                                + state[0, head, column, step * lanes + lane]
                                * queries[row, head // share * z + step * lanes + lane]
                            )
                    Y[row, head * h + column] = lane_sum(total, 0, lanes) + skip[head] * X[row, head * h + column]

    return scan_rows


def token_shift(channels: int, tile: Tile, *, single: bool) -> Any:
    """X [M, C], kept [1, 1, C] in place, start [] -> Y [M, C]: the row before each.

    Args:
        channels: C.
        tile: Sizes of the innermost loops.
        single: Whether M is 1: waking threads takes longer than one row.
    """
    loop, lanes = T.serial if single else T.parallel, divisor(channels, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def shift_rows(x: T.handle, k: T.handle, p: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, channels), "float32")
        kept = T.match_buffer(k, (1, 1, channels), "float32")
        start = T.match_buffer(p, (), "int64")
        Y = T.match_buffer(y, (m, channels), "float32")
        for block in loop(channels // lanes):
            for row in T.serial(m):
                for lane in T.vectorized(lanes):
                    Y[row, block * lanes + lane] = row_before(kept, X, start[()], row, 2, block * lanes + lane)
            for lane in T.vectorized(lanes):
                kept[0, 0, block * lanes + lane] = X[m - 1, block * lanes + lane]

    return shift_rows


def delta_rule(heads: int, h: int, v: int, tile: Tile) -> Any:
    """Queries, logs and keys [M, N * H], values [M, N * V], removals and rates [M, N * H], start [] -> Y [M, N * V].

    The state [1, N, V, H] stands before the start, and is changed in place. Each of its rows is read and written once a
    token, as what it says of a removal depends on no other row.

    Args:
        heads: N.
        h: H.
        v: V.
        tile: Sizes of the innermost loops.
    """
    lanes = divisor(h, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def delta_rows(
        q: T.handle,
        g: T.handle,
        k: T.handle,
        x: T.handle,
        u: T.handle,
        a: T.handle,
        s: T.handle,
        p: T.handle,
        y: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        queries = T.match_buffer(q, (m, heads * h), "float32")
        logs = T.match_buffer(g, (m, heads * h), "float32")
        keys = T.match_buffer(k, (m, heads * h), "float32")
        X = T.match_buffer(x, (m, heads * v), "float32")
        removals = T.match_buffer(u, (m, heads * h), "float32")
        rates = T.match_buffer(a, (m, heads * h), "float32")
        state = T.match_buffer(s, (1, heads, v, h), "float32")
        start = T.match_buffer(p, (), "int64")
        Y = T.match_buffer(y, (m, heads * v), "float32")
        for head in T.parallel(heads):
            removal = T.alloc_buffer((h,), "float32", scope="local")
            share = T.alloc_buffer((h,), "float32", scope="local")
            decay = T.alloc_buffer((h,), "float32", scope="local")
            length = T.alloc_buffer((1,), "float32", scope="local")
            recalled = T.alloc_buffer((1,), "float32", scope="local")
            total = T.alloc_buffer((2, lanes), "float32", scope="local")
            if start[()] == 0:
                for column in T.serial(v):
                    for step in T.serial(h // lanes):
                        for lane in T.vectorized(lanes):
                            state[0, head, column, step * lanes + lane] = T.float32(0)
            for row in T.serial(m):
                for lane in T.vectorized(lanes):
                    total[0, lane] = T.float32(0)
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        total[0, lane] = (
                            total[0, lane]
                            + removals[row, head * h + step * lanes + lane]
                            * removals[row, head * h + step * lanes + lane]
                        )
                length[0] = T.max(T.sqrt(lane_sum(total, 0, lanes)), T.float32(LEAST_NORM))
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        removal[step * lanes + lane] = removals[row, head * h + step * lanes + lane] / length[0]
                        share[step * lanes + lane] = (
                            removal[step * lanes + lane] * rates[row, head * h + step * lanes + lane]
                        )
                        decay[step * lanes + lane] = exponential(logs[row, head * h + step * lanes + lane])
                for column in T.serial(v):
                    for lane in T.vectorized(lanes):
                        total[0, lane] = T.float32(0)
                        total[1, lane] = T.float32(0)
                    for step in T.serial(h // lanes):
                        for lane in T.vectorized(lanes):
                            total[0, lane] = (
                                total[0, lane]
                                + state[0, head, column, step * lanes + lane] * removal[step * lanes + lane]
                            )
                    recalled[0] = lane_sum(total, 0, lanes)
                    for step in T.serial(h // lanes):
                        for lane in T.vectorized(lanes):
                            state[0, head, column, step * lanes + lane] = (
                                state[0, head, column, step * lanes + lane] * decay[step * lanes + lane]
                                - recalled[0] * share[step * lanes + lane]
                                + X[row, head * v + column] * keys[row, head * h + step * lanes + lane]
                            )
                        for lane in T.vectorized(lanes):
                            total[1, lane] = (
                                total[1, lane]
                                + state[0, head, column, step * lanes + lane]
                                * queries[row, head * h + step * lanes + lane]
                            )
                    Y[row, head * v + column] = lane_sum(total, 1, lanes)

    return delta_rows
