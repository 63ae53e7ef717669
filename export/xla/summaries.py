"""What keeps a summary in place of positions, in jax: a causal convolution and a state space, all in float32.

What follows the first `count` tokens is padding, and leaves no trace in what is kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transom.graphs.ops import PIECE


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


def _kept(state: jax.Array, start: jax.Array) -> jax.Array:
    """A summary as a call finds it: zeros at position 0, whatever stands there."""
    return jnp.where(start == 0, jnp.zeros_like(state), state)
