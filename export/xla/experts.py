"""Mixtures of experts in jax: a loop over all experts that passes over those that no token chose.

So one token reads the matrices of its experts and no others. Where there are many tokens, an expert that some chose
computes all of them, and the others' shares are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from transom.export.xla.narrow import linear_quantized
from transom.graphs import ops

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}

_Product = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x [M, K], which expert) -> [M, R]`."""


def experts(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    gate_up_bias: jax.Array | None,
    down_bias: jax.Array | None,
    activation: str,
) -> jax.Array:
    """See `ops.experts`."""
    count = down.shape[0] // x.shape[-1]

    def product(matrices: jax.Array) -> _Product:
        rows = matrices.shape[0] // count

        def multiply(x_MK: jax.Array, index: jax.Array) -> jax.Array:
            matrix_RK = jax.lax.dynamic_slice_in_dim(matrices, index * rows, rows)
            return jnp.einsum("mk,rk->mr", x_MK, matrix_RK, preferred_element_type=jnp.float32).astype(x.dtype)

        return multiply

    return _chosen(x, choices, weights, count, product(gate_up), product(down), gate_up_bias, down_bias, activation)


def experts_quantized(x: jax.Array, choices: jax.Array, weights: jax.Array, *parts: Any) -> jax.Array:
    """See `ops.experts_quantized`; the codes lie as those of a linear do, see `narrow`."""
    gate_up, down, (gate_up_bias, down_bias, activation) = parts[:4], parts[4:8], parts[8:]
    count = down[0].shape[-1] // x.shape[-1]

    def product(codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, format: str) -> _Product:
        rows = codes.shape[-1] // count

        def multiply(x_MK: jax.Array, index: jax.Array) -> jax.Array:
            own = [
                None if part is None else jax.lax.dynamic_slice_in_dim(part, index * rows, rows, part.ndim - 1)
                for part in (codes, scales, zeros)
            ]
            assert own[0] is not None and own[1] is not None
            return linear_quantized(x_MK, own[0], own[1], own[2], format)

        return multiply

    products = product(*gate_up), product(*down)
    return _chosen(x, choices, weights, count, *products, gate_up_bias, down_bias, activation)


def _chosen(
    x: jax.Array,
    choices: jax.Array,
    weights: jax.Array,
    count: int,
    gate_up: _Product,
    down: _Product,
    gate_up_bias: jax.Array | None,
    down_bias: jax.Array | None,
    activation: str,
) -> jax.Array:
    x_MD, choices_MC, weights_MC = (value.reshape(-1, value.shape[-1]) for value in (x, choices, weights))

    def bias(whole: jax.Array | None, index: jax.Array) -> jax.Array | int:
        return 0 if whole is None else jax.lax.dynamic_index_in_dim(whole.reshape(count, -1), index, keepdims=False)

    def step(index: jax.Array, total_MD: jax.Array) -> jax.Array:
        is_chosen_MC = choices_MC == index

        def add() -> jax.Array:
            shares_M1 = jnp.where(is_chosen_MC, weights_MC, 0).sum(-1, keepdims=True)
            hidden_MF = _gated(gate_up(x_MD, index) + bias(gate_up_bias, index), activation)
            out_MD = down(hidden_MF, index) + bias(down_bias, index)
            return total_MD + jnp.where(is_chosen_MC.any(-1)[:, None], out_MD * shares_M1, 0).astype(jnp.float32)

        return jax.lax.cond(is_chosen_MC.any(), add, lambda: total_MD)

    total_MD = jax.lax.fori_loop(0, count, step, jnp.zeros(x_MD.shape, jnp.float32))
    return total_MD.reshape(x.shape).astype(x.dtype)


def _gated(packed: jax.Array, activation: str) -> jax.Array:
    """What becomes of gates and ups, computed in float32."""
    gate, up = jnp.split(packed.astype(jnp.float32), 2, -1)
    if activation != ops.CLAMPED_SWIGLU:
        return (_ACTIVATIONS[activation](gate) * up).astype(packed.dtype)
    gate, up = jnp.minimum(gate, ops.SWIGLU_LIMIT), jnp.clip(up, -ops.SWIGLU_LIMIT, ops.SWIGLU_LIMIT)
    return ((up + 1) * (gate * jax.nn.sigmoid(gate * ops.SWIGLU_SLOPE))).astype(packed.dtype)
