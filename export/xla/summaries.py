"""What keeps a summary in place of positions, in jax, all in float32.

What follows the first `count` tokens is padding, and leaves no trace in what is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transom.graphs.ops import LEAST_NORM, PIECE


def causal_convolution(
    x_BTC: jax.Array,
    before_BLC: jax.Array,
    start: jax.Array,
    weight_C1W: jax.Array,
    bias_C: jax.Array | None,
    *,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`graphs.ops.causal_convolution`."""
    taps, tokens = weight_C1W.shape[2], x_BTC.shape[1]
    rows = jnp.concatenate((_kept(before_BLC, start), x_BTC), 1)
    wide, factors = rows.astype(jnp.float32), weight_C1W.astype(jnp.float32)
    total = sum(wide[:, tap : tap + tokens] * factors[:, 0, tap] for tap in range(taps))
    total = total if bias_C is None else total + bias_C.astype(jnp.float32)
    return jnp.asarray(total, x_BTC.dtype), jax.lax.dynamic_slice_in_dim(rows, count, taps - 1, 1)


def state_space(
    x_BTNH: jax.Array,
    steps_BTN: jax.Array,
    rates_N: jax.Array,
    keys_BTGZ: jax.Array,
    queries_BTGZ: jax.Array,
    skip_N: jax.Array,
    state_BNHZ: jax.Array,
    start: jax.Array,
    *,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`graphs.ops.state_space`, piece by piece; a step of zero changes nothing, which is what padding gets.

    Sums over tokens are products with triangles, which every platform has: jax's own cumulative sum is written
    otherwise for each.
    """
    tokens, heads = x_BTNH.shape[1:3]
    share = heads // keys_BTGZ.shape[2]
    with jax.default_matmul_precision("highest"):
        valid_T1 = (jnp.arange(tokens) < count)[:, None]
        steps = jnp.where(valid_T1, steps_BTN.astype(jnp.float32), 0).swapaxes(1, 2)
        x = x_BTNH.astype(jnp.float32).swapaxes(1, 2)
        keys, queries = (
            jnp.repeat(value.astype(jnp.float32).swapaxes(1, 2), share, 1) for value in (keys_BTGZ, queries_BTGZ)
        )
        logs = steps * -jnp.exp(rates_N.astype(jnp.float32))[:, None]
        state, results = _kept(state_BNHZ, start), []
        for first in range(0, tokens, PIECE):
            piece = slice(first, first + PIECE)
            length = min(PIECE, tokens - first)
            causal = jnp.tril(jnp.ones((length, length), jnp.float32))
            between = causal @ (logs[:, :, piece, None] * jnp.tril(causal, -1))
            decays = jnp.exp(between) * causal
            reached = jnp.exp(logs[:, :, piece] @ causal.T)[..., None]
            inputs = x[:, :, piece] * steps[:, :, piece, None]
            scores = queries[:, :, piece] @ keys[:, :, piece].swapaxes(2, 3)
            results.append((scores * decays) @ inputs + reached * (queries[:, :, piece] @ state.swapaxes(2, 3)))
            added = (inputs * decays[:, :, -1, :, None]).swapaxes(2, 3) @ keys[:, :, piece]
            state = reached[:, :, -1:] * state + added
        y = jnp.concatenate(results, 2) + skip_N.astype(jnp.float32)[:, None, None] * x
    return y.swapaxes(1, 2).astype(x_BTNH.dtype), state


def token_shift(
    x_BTC: jax.Array, before_B1C: jax.Array, start: jax.Array, *, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`graphs.ops.token_shift`."""
    rows = jnp.concatenate((_kept(before_B1C, start), x_BTC), 1)
    return rows[:, :-1], jax.lax.dynamic_slice_in_dim(rows, count, 1, 1)


def delta_rule(
    queries_BTNH: jax.Array,
    logs_BTNH: jax.Array,
    keys_BTNH: jax.Array,
    values_BTNV: jax.Array,
    removals_BTNH: jax.Array,
    rates_BTNH: jax.Array,
    state_BNVH: jax.Array,
    start: jax.Array,
    *,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`graphs.ops.delta_rule`, token by token; padding has no decay, no value and no removal."""
    valid_T111 = (jnp.arange(queries_BTNH.shape[1]) < count)[:, None, None, None]
    q, logs, k, v, u, rates = (
        value.astype(jnp.float32).swapaxes(0, 1)
        for value in (queries_BTNH, logs_BTNH, keys_BTNH, values_BTNV, removals_BTNH, rates_BTNH)
    )
    u = u / jnp.maximum(jnp.linalg.norm(u, axis=-1, keepdims=True), LEAST_NORM)
    decays, k, replaced = jnp.exp(jnp.where(valid_T111, logs, 0)), k * valid_T111, u * rates * valid_T111

    def step(state: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, decay, key, value, removal, share = rows
        recalled = (state @ removal[..., None])[..., 0]
        put = value[..., None] * key[..., None, :] - recalled[..., None] * share[..., None, :]
        state = state * decay[..., None, :] + put
        return state, (state @ query[..., None])[..., 0]

    with jax.default_matmul_precision("highest"):
        state, y = jax.lax.scan(step, _kept(state_BNVH, start), (q, decays, k, v, u, replaced))
    return y.swapaxes(0, 1).astype(values_BTNV.dtype), state


def _kept(state: jax.Array, start: jax.Array) -> jax.Array:
    """A summary as a call finds it: zeros at position 0, whatever stands there."""
    return jnp.where(start == 0, jnp.zeros_like(state), state)
