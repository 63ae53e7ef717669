"""Attention over ring caches in jax: `transom::attend` and `transom::write_cache` for a fixed number of new tokens.

Position p of a ring of S slots stands in slot p % S. What is live is only known at run time, so each path reads the
least that a static program can:

- One new token: it attends over the ring as it is after the write, if that is long by blocks of slots.
- Local layers, many tokens: old and new keys are laid out by position, and each block of queries sees one slice of
  `window + block` keys; the window is the reach of the mask, which may hide keys within it.
- Global layers, many tokens: an online softmax over blocks of slots of the written cache (FlashAttention's;
  arXiv 2205.14135).
- Images, whose tokens see each other: a block of queries goes on to the end of the farthest image among them. Of a text
  alone no further key is visited.
- Sinks begin the online softmax: a score that was seen before all keys, without a value.
- Encoders, where every token sees every other: blocks of queries one after the other, each over all keys.

A write of one token, or into a global layer's cache, is a `dynamic_update_slice`, in place when the caches are donated.
Where attention reads what was written, it states the same write, which XLA computes once.

Blocks past the last valid token and slots past the last live one are never visited: loops end at run time.
Axis letters as in the model files, and G: query heads that share one kv head; J: keys of a block; E: keys by position.

What a TPU v5e's compiler says of one layer, 2,048 new tokens, bfloat16, caches donated (bytes beside arguments and
results; estimated time, where loop bodies are counted by hand):

    heads, window, slots           all scores at once     banded, all blocks    this file
    N4 K1 H256, local, W 512       0, 429 us              0, 237 us             0, 290 us
    N8 K4 H256, local, W 1024      192 MiB, 1,144 us      128 MiB, 1,081 us     0, 970 us
    N4 K1 H256, global, S 32768    1,088 MiB, 5,602 us                          0, 0.4 ms at the context's start
    N8 K4 H256, global, S 32768    2,180 MiB, 10,862 us                         0

The banded form computes padding too, which this one skips. One token over 32,768 slots: 139 us in one piece, 50 us in
blocks when all are live. On one CPU core: 495 ms in one piece, 27 ms in blocks of 4,096 with 500 positions live.
Pallas' splash kernel is not used: it needs its mask at compile time, so a cache's live slots would have to be hidden
by segments and visited all the same; it runs on a TPU only, so the programs for CPU and TPU would part; and it has no
time estimate by which it could be shown to be better without a TPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transom.graphs.ops import Mask

QUERY_BLOCK = 256
KEY_BLOCK = 1024
DECODE_BLOCK = 2048
ENCODER_BLOCK = 128

HIDDEN = -1e30
"""Score of a key that is not seen; finite, so that a row without keys gives no NaN."""


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_cache_BKSH: jax.Array,
    v_cache_BKSH: jax.Array,
    start: jax.Array,
    until_T: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    *,
    count: jax.Array,
    scale: float,
    window: int,
    softcap: float = 0.0,
    segment: int = 0,
    dilation: int = 1,
) -> jax.Array:
    """Attend over the caches as they were, and over the new tokens. Returns [B, T, N, H].

    Args:
        q_BTNH: Queries; N is a multiple of K.
        k_BTKH: Keys of the new tokens.
        v_BTKH: Values of the new tokens.
        k_cache_BKSH: Keys; a local layer needs S >= its mask's reach, a global one S >= `start + count`.
        v_cache_BKSH: Values.
        start: Position of the first new token, an int32 scalar.
        until_T: Last position that each new token sees, a new one: the end of its image; None for its own.
        sinks_N: Scores without values, which every token sees; None for none.
        count: How many of the new tokens are real, an int32 scalar from 1 to T; the rest is padding, whose rows of the
            result mean nothing.
        scale: What scores are multiplied by.
        window: Keys that a token sees, itself included; 0 for all. With `segment` and `dilation` it is a `Mask`.
        softcap: Bound on the scores; 0 for none.
        segment: Length of the segments that positions are cut into; 0 for none.
        dilation: Of every so many positions a token sees one.
    """
    B, T, N, H = q_BTNH.shape
    K = k_cache_BKSH.shape[1]
    rule, mask = Scores.of(scale, softcap, sinks_N, K), Mask(window=window, segment=segment, dilation=dilation)
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    pairs = (k_cache_BKSH, k_BTKH.swapaxes(1, 2)), (v_cache_BKSH, v_BTKH.swapaxes(1, 2))
    # Padding is nobody's image.
    until_T = None if until_T is None else jnp.minimum(until_T, start + count - 1)
    if T > 1 and mask.reach:
        k_BKEH, v_BKEH = (_by_position(cache, new, start) for cache, new in pairs)
        out_BKGTH = _banded(q_BKGTH, k_BKEH, v_BKEH, start, until_T, count, rule, mask)
    else:
        k_BKSH, v_BKSH = (write(cache, new, start, count, wraps=bool(mask.reach)) for cache, new in pairs)
        if T == 1:
            out_BKGTH = _decode(q_BKGTH, k_BKSH, v_BKSH, start, rule, mask)
        else:
            out_BKGTH = _causal(q_BKGTH, k_BKSH, v_BKSH, start, until_T, count, rule, mask)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, v_BTKH.shape[3])


def attend_fully(q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *, scale: float) -> jax.Array:
    """Attend over all keys, without caches or a mask. Returns [B, N, T, H]; N is a multiple of K."""
    B, N, T, H = q_BNTH.shape
    K, size = k_BKSH.shape[1], min(ENCODER_BLOCK, T)
    q_BKGTH = _blocked(q_BNTH.reshape(B, K, N // K, T, H), size)
    blocks = jnp.moveaxis(q_BKGTH.reshape(B, K, N // K, -1, size, H), 3, 0)

    def block(q_BKGTH: jax.Array) -> jax.Array:
        scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(scores, -1).astype(v_BKSH.dtype)
        out = jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH, preferred_element_type=jnp.float32)
        return out.astype(q_BKGTH.dtype)

    # One block after the other: the scores of all of them at once would be gigabytes.
    out_BKGTH = jnp.moveaxis(jax.lax.map(block, blocks), 0, 3).reshape(B, N, -1, v_BKSH.shape[3])
    return out_BKGTH[:, :, :T]


def write(cache_BKSH: jax.Array, new_BKTH: jax.Array, start: jax.Array, count: jax.Array, *, wraps: bool) -> jax.Array:
    """The cache with the first `count` new tokens in it; position p stands in slot p % S.

    Args:
        cache_BKSH: Keys or values.
        new_BKTH: Those of the new tokens.
        start: Position of the first new token.
        count: How many of them are real.
        wraps: Whether it is a ring, of which every call may write the end and the front. One of a global layer has
            slots for the whole context.
    """
    slots, tokens = cache_BKSH.shape[2], new_BKTH.shape[2]
    if tokens == 1:
        return jax.lax.dynamic_update_slice_in_dim(cache_BKSH, new_BKTH, start % slots, 2)
    if wraps:
        # In an order that attention shares: a write into the ring that it still reads would take a copy of it.
        last_BKSH = _slice(_by_position(cache_BKSH, new_BKTH, start), count, slots)
        return jnp.roll(last_BKSH, (start + count) % slots, 2)
    new_BKTH = new_BKTH[:, :, :slots]
    tokens = new_BKTH.shape[2]
    begin = jnp.minimum(start, slots - tokens)
    index_T = begin - start + jnp.arange(tokens)
    valid_T = (index_T >= 0) & (index_T < count)
    moved_BKTH = jnp.roll(new_BKTH, start - begin, 2)
    kept_BKTH = jnp.where(valid_T[:, None], moved_BKTH, _slice(cache_BKSH, begin, tokens))
    return jax.lax.dynamic_update_slice_in_dim(cache_BKSH, kept_BKTH, begin, 2)


class Scores(NamedTuple):
    """How scores are made.

    Attributes:
        scale: What products of queries and keys are multiplied by.
        softcap: Bound on the scores; 0 for none.
        sinks: Scores without values, float32 [K, G, 1]; None for none.
    """

    scale: float
    softcap: float
    sinks: jax.Array | None

    @staticmethod
    def of(scale: float, softcap: float, sinks_N: jax.Array | None, key_heads: int) -> Scores:
        sinks = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(key_heads, -1, 1)
        return Scores(scale, softcap, sinks)

    def between(self, q_BKGTH: jax.Array, k_BKJH: jax.Array) -> jax.Array:
        """Scores [B, K, G, T, J] before any mask, float32."""
        scores = jnp.einsum("bkgth,bkjh->bkgtj", q_BKGTH, k_BKJH, preferred_element_type=jnp.float32) * self.scale
        return self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores

    def weights(self, masked_BKGTJ: jax.Array) -> jax.Array:
        """The softmax of all of a query's scores, in which the sinks take part."""
        if self.sinks is None:
            return jax.nn.softmax(masked_BKGTJ, -1)
        sinks = self.sinks[..., None]
        top = jnp.maximum(masked_BKGTJ.max(-1, keepdims=True), sinks)
        weights = jnp.exp(masked_BKGTJ - top)
        return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sinks - top))


class _Softmax(NamedTuple):
    """State of an online softmax, float32.

    Attributes:
        top: Largest score [B, K, G, T].
        total: Sum of weights [B, K, G, T].
        out: Weighted sum of values [B, K, G, T, H].
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array

    @staticmethod
    def empty(q_BKGTH: jax.Array, v_BKSH: jax.Array, rule: Scores) -> _Softmax:
        """The state before any key: a sink is the largest score so far, and has a weight of 1."""
        zero_BKGT = jnp.zeros(q_BKGTH.shape[:-1], jnp.float32)
        top, total = (HIDDEN, 0) if rule.sinks is None else (rule.sinks, 1)
        return _Softmax(zero_BKGT + top, zero_BKGT + total, _zeros(q_BKGTH, v_BKSH).astype(jnp.float32))

    def over(
        self, q_BKGTH: jax.Array, k_BKJH: jax.Array, v_BKJH: jax.Array, seen_TJ: jax.Array, rule: Scores
    ) -> _Softmax:
        """The state after more keys; `seen_TJ` may have one row for all queries."""
        scores = jnp.where(seen_TJ, rule.between(q_BKGTH, k_BKJH), HIDDEN)
        top = jnp.maximum(self.top, scores.max(-1))
        weights, fade = jnp.exp(scores - top[..., None]), jnp.exp(self.top - top)
        more = jnp.einsum("bkgtj,bkjh->bkgth", weights.astype(v_BKJH.dtype), v_BKJH, preferred_element_type=jnp.float32)
        return _Softmax(top, self.total * fade + weights.sum(-1), self.out * fade[..., None] + more)

    def result(self, dtype: jnp.dtype) -> jax.Array:
        return (self.out / self.total[..., None]).astype(dtype)


def _zeros(q_BKGTH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """Zeros in the shape of attention's result: values may be narrower than queries."""
    return jnp.zeros((*q_BKGTH.shape[:-1], v_BKSH.shape[-1]), q_BKGTH.dtype)


def narrowed(seen: jax.Array, positions: jax.Array, keys: jax.Array, mask: Mask) -> jax.Array:
    """Less what the mask's conditions hide; positions of queries and keys broadcast with each other."""
    return functools.reduce(jnp.logical_and, mask.conditions(positions, keys), seen)


def _slice(x_BKSH: jax.Array, begin: jax.Array | int, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_BKSH, begin, size, 2)


def _decode(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, start: jax.Array, rule: Scores, mask: Mask
) -> jax.Array:
    """One token over a ring that already holds it."""
    slots = k_BKSH.shape[2]

    def block(state: _Softmax, begin: jax.Array | int, size: int) -> _Softmax:
        """Slots that the block before this one has seen, as the last block overlaps it, are not seen again."""
        first = jnp.minimum(begin, slots - size)
        slots_J = first + jnp.arange(size)
        distance_J = (start - slots_J) % slots
        seen_J = (distance_J <= start) & (slots_J >= begin)
        # A ring of a window's slots holds nothing else.
        if not (mask.is_window and mask.window >= slots):
            seen_J = narrowed(seen_J, start, start - distance_J, mask)
        return state.over(q_BKGTH, _slice(k_BKSH, first, size), _slice(v_BKSH, first, size), seen_J[None], rule)

    state = _Softmax.empty(q_BKGTH, v_BKSH, rule)
    if slots <= DECODE_BLOCK:
        return block(state, 0, slots).result(q_BKGTH.dtype)
    live = jnp.minimum(start + 1, slots)
    blocks = (live + DECODE_BLOCK - 1) // DECODE_BLOCK
    state = jax.lax.fori_loop(0, blocks, lambda i, state: block(state, i * DECODE_BLOCK, DECODE_BLOCK), state)
    return state.result(q_BKGTH.dtype)


def _by_position(cache_BKSH: jax.Array, new_BKTH: jax.Array, start: jax.Array) -> jax.Array:
    """The ring's keys in the order of their positions, then the new ones: index e is position `start - S + e`."""
    slots = cache_BKSH.shape[2]
    return jnp.concatenate((jnp.roll(cache_BKSH, -(start % slots), 2), new_BKTH), 2)


def _blocked(x_BKGTH: jax.Array, size: int) -> jax.Array:
    """Pad the tokens to a multiple of the block's size."""
    return jnp.pad(x_BKGTH, ((0, 0),) * 3 + ((0, -x_BKGTH.shape[3] % size), (0, 0)))


def _banded(
    q_BKGTH: jax.Array,
    k_BKEH: jax.Array,
    v_BKEH: jax.Array,
    start: jax.Array,
    until_T: jax.Array | None,
    count: jax.Array,
    rule: Scores,
    mask: Mask,
) -> jax.Array:
    """Blocks of queries, each over the keys from one window before it to its end, or to that of its last image."""
    tokens = q_BKGTH.shape[3]
    slots = k_BKEH.shape[2] - tokens
    size = min(QUERY_BLOCK, tokens)
    before = min(mask.reach, slots)
    q_BKGTH = _blocked(q_BKGTH, size)
    padding = ((0, 0), (0, 0), (0, q_BKGTH.shape[3] - tokens), (0, 0))
    k_BKEH, v_BKEH = jnp.pad(k_BKEH, padding), jnp.pad(v_BKEH, padding)
    keys_J = jnp.arange(before + size) - before
    distance_TJ = jnp.arange(size)[:, None] - keys_J
    in_band_TJ = (distance_TJ >= 0) & (distance_TJ < mask.reach)

    def with_images(q: jax.Array, first: jax.Array) -> jax.Array:
        last_T, positions_T = _last(until_T, first, size), start + first + jnp.arange(size)

        def over(state: _Softmax, begin: jax.Array, width: int) -> _Softmax:
            """Keys from `begin` on, counted from the first new token."""
            keys_J = start + begin + jnp.arange(width)
            seen_TJ = narrowed((keys_J >= 0) & (keys_J <= last_T[:, None]), positions_T[:, None], keys_J, mask)
            k, v = (_slice(x, slots + begin, width) for x in (k_BKEH, v_BKEH))
            return state.over(q, k, v, seen_TJ, rule)

        state = over(_Softmax.empty(q, v_BKEH, rule), first - before, before + size)
        further = (last_T.max() - start - first) // size
        state = jax.lax.fori_loop(1, further + 1, lambda j, state: over(state, first + j * size, size), state)
        return state.result(q.dtype)

    def block(i: jax.Array, out_BKGTH: jax.Array) -> jax.Array:
        first = i * size
        q = jax.lax.dynamic_slice_in_dim(q_BKGTH, first, size, 3)
        if until_T is None:
            k, v = (_slice(x, first + slots - before, before + size) for x in (k_BKEH, v_BKEH))
            seen_TJ = in_band_TJ & (start + first + keys_J >= 0)
            if not mask.is_window:
                queries_T = start + first + jnp.arange(size)
                seen_TJ = narrowed(seen_TJ, queries_T[:, None], start + first + keys_J, mask)
            weights = rule.weights(jnp.where(seen_TJ, rule.between(q, k), HIDDEN)).astype(v.dtype)
            out = jnp.einsum("bkgtj,bkjh->bkgth", weights, v)
        else:
            out = with_images(q, first)
        return jax.lax.dynamic_update_slice_in_dim(out_BKGTH, out, first, 3)

    blocks = (count + size - 1) // size
    return jax.lax.fori_loop(0, blocks, block, _zeros(q_BKGTH, v_BKEH))[:, :, :, :tokens]


def _last(until_T: jax.Array | None, first: jax.Array, size: int) -> jax.Array:
    """Last position that each query of a block sees; the block may be longer than what is left of the tokens."""
    assert until_T is not None
    return jax.lax.dynamic_slice_in_dim(jnp.pad(until_T, (0, size)), first, size)


def _causal(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    start: jax.Array,
    until_T: jax.Array | None,
    count: jax.Array,
    rule: Scores,
    mask: Mask,
) -> jax.Array:
    """Blocks of queries over a cache that already holds them, a block of live slots at a time."""
    tokens, slots = q_BKGTH.shape[3], k_BKSH.shape[2]
    size, width = min(QUERY_BLOCK, tokens), min(KEY_BLOCK, slots)
    q_BKGTH = _blocked(q_BKGTH, size)

    def block(i: jax.Array, out_BKGTH: jax.Array) -> jax.Array:
        q = jax.lax.dynamic_slice_in_dim(q_BKGTH, i * size, size, 3)
        last_T = start + i * size + jnp.arange(size) if until_T is None else _last(until_T, i * size, size)

        def over(j: jax.Array, state: _Softmax) -> _Softmax:
            # The last block may overlap the one before it; slots seen there are not seen again.
            first = jnp.minimum(j * width, slots - width)
            slots_J = first + jnp.arange(width)
            seen_TJ = (slots_J <= last_T[:, None]) & (slots_J >= j * width)
            if not mask.is_window:
                queries_T = start + i * size + jnp.arange(size)
                seen_TJ = narrowed(seen_TJ, queries_T[:, None], slots_J, mask)
            return state.over(q, _slice(k_BKSH, first, width), _slice(v_BKSH, first, width), seen_TJ, rule)

        live = jnp.minimum(start + (i + 1) * size if until_T is None else last_T.max() + 1, slots)
        state = jax.lax.fori_loop(0, (live + width - 1) // width, over, _Softmax.empty(q, v_BKSH, rule))
        return jax.lax.dynamic_update_slice_in_dim(out_BKGTH, state.result(q.dtype), i * size, 3)

    blocks = (count + size - 1) // size
    return jax.lax.fori_loop(0, blocks, block, _zeros(q_BKGTH, v_BKSH))[:, :, :, :tokens]
