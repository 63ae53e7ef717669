"""Operations that treat every new token by itself: norms, rotations, the gated activation, rows of a table.

Axes: M rows (tokens), K numbers of a row, N heads, H numbers of a head.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from transom.export.tvm.kernels.arithmetic import exponential, hyperbolic_tangent, lane_sum
from transom.export.tvm.kernels.tile import Tile, divisor
from transom.graphs import ops

GELU_FACTOR, GELU_CUBE = 0.7978845608028654, 0.044715
"""tanh's argument in the approximate GELU is `GELU_FACTOR * (x + GELU_CUBE * x ** 3)`."""


@T.inline
def normalize(X, W, Y, row, first, eps, h, lanes):  # type: ignore[no-untyped-def]
    """One norm over the `h` numbers of a row from `first` on."""
    squares = T.alloc_buffer((lanes,), "float32", scope="local")
    factor = T.alloc_buffer((1,), "float32", scope="local")
    for lane in T.vectorized(lanes):
        squares[lane] = T.float32(0)
    for step in T.serial(h // lanes):
        for lane in T.vectorized(lanes):
            squares[lane] = squares[lane] + X[row, first + step * lanes + lane] * X[row, first + step * lanes + lane]
    factor[0] = T.float32(0)
    for lane in T.unroll(lanes):
        factor[0] = factor[0] + squares[lane]
    factor[0] = T.float32(1) / T.sqrt(factor[0] / T.float32(h) + T.float32(eps))
    for step in T.serial(h // lanes):
        for lane in T.vectorized(lanes):
            Y[row, first + step * lanes + lane] = (
                X[row, first + step * lanes + lane] * factor[0] * W[step * lanes + lane]
            )


def rms_norm(heads: int, h: int, eps: float, tile: Tile) -> Any:
    """X [M, N * H], weight [H] -> Y [M, N * H], each head by itself."""
    lanes = divisor(h, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def rms_norm_rows(x: T.handle, w: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, heads * h), "float32")
        W = T.match_buffer(w, (h,), "float32")
        Y = T.match_buffer(y, (m, heads * h), "float32")
        for row in T.serial(m):
            for head in T.serial(heads):
                normalize(X, W, Y, row, head * h, eps, h, lanes)

    return rms_norm_rows


def add_rms_norm(h: int, eps: float, tile: Tile) -> Any:
    """X [M, H], residual [M, H], weight [H] -> norm of the sum [M, H], sum [M, H]."""
    lanes = divisor(h, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def add_rms_norm_rows(x: T.handle, r: T.handle, w: T.handle, y: T.handle, t: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, h), "float32")
        R = T.match_buffer(r, (m, h), "float32")
        W = T.match_buffer(w, (h,), "float32")
        Y = T.match_buffer(y, (m, h), "float32")
        total = T.match_buffer(t, (m, h), "float32")
        for row in T.serial(m):
            for step in T.serial(h // lanes):
                for lane in T.vectorized(lanes):
                    total[row, step * lanes + lane] = X[row, step * lanes + lane] + R[row, step * lanes + lane]
            normalize(total, W, Y, row, 0, eps, h, lanes)

    return add_rms_norm_rows


def layer_norm(heads: int, h: int, eps: float, tile: Tile, *, biased: bool = True) -> Any:
    """X [M, N * H], weight [H], bias [H] -> Y [M, N * H], each head by itself.

    Any numbers stand in the bias's place where there is none.
    """
    lanes, share = divisor(h, tile.lanes), float(biased)

    @T.prim_func(private=True, s_tir=True)
    def layer_norm_rows(x: T.handle, w: T.handle, b: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, heads * h), "float32")
        W = T.match_buffer(w, (h,), "float32")
        B = T.match_buffer(b, (h,), "float32")
        Y = T.match_buffer(y, (m, heads * h), "float32")
        for row in T.parallel(m):
            sums = T.alloc_buffer((1, lanes), "float32", scope="local")
            mean = T.alloc_buffer((1,), "float32", scope="local")
            factor = T.alloc_buffer((1,), "float32", scope="local")
            for head in T.serial(heads):
                for lane in T.vectorized(lanes):
                    sums[0, lane] = T.float32(0)
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        sums[0, lane] = sums[0, lane] + X[row, head * h + step * lanes + lane]
                mean[0] = lane_sum(sums, 0, lanes) / T.float32(h)
                for lane in T.vectorized(lanes):
                    sums[0, lane] = T.float32(0)
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        sums[0, lane] = sums[0, lane] + (X[row, head * h + step * lanes + lane] - mean[0]) * (
                            X[row, head * h + step * lanes + lane] - mean[0]
                        )
                factor[0] = T.float32(1) / T.sqrt(lane_sum(sums, 0, lanes) / T.float32(h) + T.float32(eps))
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        Y[row, head * h + step * lanes + lane] = (
                            X[row, head * h + step * lanes + lane] - mean[0]
                        ) * factor[0] * W[step * lanes + lane] + B[step * lanes + lane] * T.float32(share)

    return layer_norm_rows


def rotary(heads: int, h: int, tile: Tile, *, interleaved: bool = False) -> Any:
    """X [M, N * H], cosines and sines [M, H / 2] -> Y [M, N * H]: pairs (x[i], x[i + H / 2]) or neighbours, turned."""
    half = h // 2
    lanes = divisor(half, tile.lanes)
    stride, other = (2, 1) if interleaved else (1, half)

    @T.prim_func(private=True, s_tir=True)
    def rotary_rows(x: T.handle, c: T.handle, s: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, heads * h), "float32")
        C = T.match_buffer(c, (m, half), "float32")
        S = T.match_buffer(s, (m, half), "float32")
        Y = T.match_buffer(y, (m, heads * h), "float32")
        for row in T.serial(m):
            for head in T.serial(heads):
                for step in T.serial(half // lanes):
                    for lane in T.vectorized(lanes):
                        Y[row, head * h + stride * (step * lanes + lane)] = (
                            X[row, head * h + stride * (step * lanes + lane)] * C[row, step * lanes + lane]
                            - X[row, head * h + other + stride * (step * lanes + lane)] * S[row, step * lanes + lane]
                        )
                        Y[row, head * h + other + stride * (step * lanes + lane)] = (
                            X[row, head * h + other + stride * (step * lanes + lane)] * C[row, step * lanes + lane]
                            + X[row, head * h + stride * (step * lanes + lane)] * S[row, step * lanes + lane]
                        )

    return rotary_rows


def gelu_tanh(x: Any) -> Any:
    """`gelu_tanh(x)`: as `(1 + tanh(u)) / 2` is `1 / (1 + exp(-2 u))`, one exponential does."""
    inner = (x + T.float32(GELU_CUBE) * x * x * x) * T.float32(-2 * GELU_FACTOR)
    return x / (T.float32(1) + exponential(inner))


def gelu(x: Any) -> Any:
    """`gelu(x)`, exact."""
    return x * T.float32(0.5) * (T.float32(1) + T.erf(x * T.float32(0.5**0.5)))


def silu(x: Any) -> Any:
    """`silu(x)`."""
    return x / (T.float32(1) + exponential(-x))


def softplus(x: Any) -> Any:
    """`log(1 + exp(x))`: with u = exp(-|x|), log(1 + u) is the series of 2 atanh(u / (2 + u)), as no sum loses u."""
    small = exponential(T.min(x, -x))
    ratio = small / (small + T.float32(2))
    square = ratio * ratio
    series = T.float32(1 / 17)
    for power in range(15, 0, -2):
        series = series * square + T.float32(1 / power)
    return T.max(x, T.float32(0)) + T.float32(2) * ratio * series


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "tanh": hyperbolic_tangent, "softplus": softplus}


def clamped_swiglu(gate: Any, up: Any) -> Any:
    """See `ops.CLAMPED_SWIGLU`."""
    limit = T.float32(ops.SWIGLU_LIMIT)
    gate, up = T.min(gate, limit), T.max(T.min(up, limit), T.float32(-ops.SWIGLU_LIMIT))
    return (up + T.float32(1)) * (gate / (T.float32(1) + exponential(gate * T.float32(-ops.SWIGLU_SLOPE))))


def gated(k: int, activation: str, tile: Tile, *, single: bool = False) -> Any:
    """Gates and values side by side [M, 2 K] -> activation(gate) * value [M, K]; `single` if M is 1."""
    # Waking threads takes longer than one row.
    loop = T.serial if single else T.parallel
    lanes = divisor(k, tile.lanes)

    def function(gate: Any, up: Any) -> Any:
        return clamped_swiglu(gate, up) if activation == ops.CLAMPED_SWIGLU else ACTIVATIONS[activation](gate) * up

    @T.prim_func(private=True, s_tir=True)
    def gated_rows(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, 2 * k), "float32")
        Y = T.match_buffer(y, (m, k), "float32")
        for row in loop(m):
            for step in T.serial(k // lanes):
                for lane in T.vectorized(lanes):
                    Y[row, step * lanes + lane] = function(X[row, step * lanes + lane], X[row, k + step * lanes + lane])

    return gated_rows


def activated(k: int, activation: str, tile: Tile) -> Any:
    """X [M, K] -> activation(X) [M, K]."""
    lanes, function = divisor(k, tile.lanes), ACTIVATIONS[activation]

    @T.prim_func(private=True, s_tir=True)
    def activated_rows(x: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        X = T.match_buffer(x, (m, k), "float32")
        Y = T.match_buffer(y, (m, k), "float32")
        for row in T.parallel(m):
            for step in T.serial(k // lanes):
                for lane in T.vectorized(lanes):
                    Y[row, step * lanes + lane] = function(X[row, step * lanes + lane])

    return activated_rows


def table_rows(k: int, tile: Tile) -> Any:
    """Indices int64 [M], table [any, K] -> rows [M, K]."""
    lanes = divisor(k, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def select_rows(index: T.handle, w: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        size = T.int64()
        index_M = T.match_buffer(index, (m,), "int64")
        W = T.match_buffer(w, (size, k), "float32")
        Y = T.match_buffer(y, (m, k), "float32")
        for row in T.serial(m):
            for step in T.serial(k // lanes):
                for lane in T.vectorized(lanes):
                    Y[row, step * lanes + lane] = W[index_M[row], step * lanes + lane]

    return select_rows
