"""Elementary functions as vector arithmetic. The C library's take one number at a time."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

# Coefficients of Cephes' expf.
_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_LOWEST, _HIGHEST = -87.0, 88.0
_MANTISSA_BITS, _BIAS = 23, 127

# Coefficients of Eigen's tanh: odd powers of x over even ones, lowest first; beyond the bound, tanh rounds to 1.
_TANH_ABOVE = (
    4.89352455891786e-3, 6.37261928875436e-4, 1.48572235717979e-5, 5.12229709037114e-8, -8.60467152213735e-11,
    2.00018790482477e-13, -2.76076847742355e-16,
)  # fmt: skip
_TANH_BELOW = (4.89352518554385e-3, 2.26843463243900e-3, 1.18534705686654e-4, 1.19825839466702e-6)
_TANH_BOUND = 7.90531110763549805


def exponential(x: Any) -> Any:
    """`exp(x)` of a float32 expression, to 2 units in the last place; x is clipped to [-87, 88]."""
    x = T.max(T.min(x, T.float32(_HIGHEST)), T.float32(_LOWEST))
    power = T.floor(x * T.float32(_LOG2_E) + T.float32(0.5))
    rest = x - power * T.float32(_LN2_HIGH) - power * T.float32(_LN2_LOW)
    series = T.float32(_TERMS[0])
    for term in _TERMS[1:]:
        series = series * rest + T.float32(term)
    series = series * rest * rest + rest + T.float32(1)
    bits = (T.Cast("int32", power) + T.int32(_BIAS)) << T.int32(_MANTISSA_BITS)
    return series * T.reinterpret("float32", bits)


def hyperbolic_tangent(x: Any) -> Any:
    """`tanh(x)` of a float32 expression, to 2e-7 of itself."""
    x = T.max(T.min(x, T.float32(_TANH_BOUND)), T.float32(-_TANH_BOUND))
    return x * _polynomial(_TANH_ABOVE, x * x) / _polynomial(_TANH_BELOW, x * x)


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    """Lowest power first."""
    total = T.float32(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + T.float32(coefficient)
    return total


def lane_sum(total: Any, row: Any, lanes: int) -> Any:
    """Sum of `total[row, :lanes]`, by halves: one after the other, each addition would wait for the last."""
    terms = [total[row, lane] for lane in range(lanes)]
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [terms[index] + terms[index + half] for index in range(half)]
    return terms[0]
