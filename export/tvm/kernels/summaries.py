"""What keeps a summary in place of positions: a causal convolution and a state space, token by token.

Both change their summaries in place. A head's state stays in the processor's nearest cache from token to token, so one
token costs one pass over it, and a prompt no more a token than that.

Axes: M new tokens, C channels, W taps, N heads, H numbers of a head, G groups of heads, Z numbers of the state of each.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from transom.export.tvm.kernels.arithmetic import exponential, lane_sum
from transom.export.tvm.kernels.tile import Tile, divisor


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
