"""Block-quantised weights in jax: they stay narrow in memory, and are widened inside the product that reads them.

The graph's own order of axes, [R, G, C], is as good for one token, as a TPU's compiler chooses how arguments lie in
memory; with many tokens it makes temporary copies. So parameters are arranged otherwise, and nothing is ever unpacked
from nibbles in the graph:

- weights of linears: codes [G, C, R]; scales and zeros, which are zero points or float32 offsets, [G, R]
- tables, whose rows are looked up and which may serve as the head too: codes [R, K], scales and zeros [G, R]

Letters: R rows, K columns in G blocks of C. Symmetric codes are signed, the others unsigned with a zero point; 4-bit
ones are `int4` and `uint4`, which XLA packs two a byte on a TPU. Codes may be `float8_e4m3fn` just as well; those of
SFP8 are bytes, and become floats by moving their bits.

What a TPU v5e's compiler says (bytes beside arguments and results, estimated time):

                                                       [R, G, C]               as here
    linear 21504 x 5376, 4 bits, 1 token               0, 140 us               0, 140 us
    the same, 2,048 tokens                             221 MiB, 2,976 us       0, 2,801 us
    lookup and head, 262144 x 1152, 8 bits, 1 token    0, 435 us               0, 459 us
    the same, 2,048 tokens and one wanted position     512 MiB, 1,983 us       128 MiB, 830 us
    lookup and head, 262208 x 5376, 8 bits, 1 token    0, 1,982 us             0, 2,327 us
    the same, 2,048 tokens and one wanted position     1,536 MiB, 6,982 us     128 MiB, 2,895 us

In bfloat16 the linear takes 314 us and 2,523 us.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def linear_quantized(
    x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, format: str
) -> jax.Array:
    """`x @ dequantize(codes).T`, [..., R], for weights of linears and for tables."""
    if codes.ndim == 2:
        return _head(x, codes, scales, zeros, format)
    zero_points, offsets = _zeros(zeros)
    values = _widened(codes, format)
    if zero_points is not None:
        values -= zero_points.astype(jnp.float32)[:, None]
    values *= scales[:, None]
    weight_GCR = (values if offsets is None else values + offsets[:, None]).astype(x.dtype)
    x_GC = x.reshape(*x.shape[:-1], *codes.shape[:2])
    return jnp.einsum("...gc,gcr->...r", x_GC, weight_GCR, preferred_element_type=jnp.float32).astype(x.dtype)


def _widened(codes: jax.Array, format: str) -> jax.Array:
    """Codes as float32; see `formats.sfp8`."""
    if format != "sfp8":
        return codes.astype(jnp.float32)
    wide = codes.astype(jnp.int32)
    low = wide & 127
    bits = jnp.where(low >= 64, (low << 20) + (112 << 23), (low << 21) + (104 << 23))
    size = jax.lax.bitcast_convert_type(jnp.where(low == 0, 0, bits), jnp.float32)
    return jnp.where(wide >= 128, -size, size)


def _head(
    x: jax.Array, codes_RK: jax.Array, scales_GR: jax.Array, zeros_GR: jax.Array | None, format: str
) -> jax.Array:
    """Scales come after the product, so that the codes are read once, as they are."""
    blocks, columns = scales_GR.shape[0], codes_RK.shape[1]
    x_GC = x.reshape(*x.shape[:-1], blocks, columns // blocks)
    # Every code of 8 bits or fewer is exact in bfloat16.
    codes_RK = _widened(codes_RK, format).astype(x.dtype)
    if _is_one(x.shape[:-1]):
        # Each block of the input alone in a row of zeros: one product gives every block's share.
        x_GK = jnp.where(jnp.eye(blocks, dtype=bool)[:, :, None], x_GC.reshape(1, blocks, -1), 0).reshape(blocks, -1)
        shares = jnp.einsum("gk,rk->gr", x_GK, codes_RK, preferred_element_type=jnp.float32)
        shares = _scaled(shares, x_GC.reshape(blocks, -1), scales_GR, zeros_GR)
        return shares.sum(0).reshape(*x.shape[:-1], -1).astype(x.dtype)
    # The shares of many tokens would be larger than the table.
    total = jnp.zeros((*x.shape[:-1], codes_RK.shape[0]), jnp.float32)
    for i in range(blocks):
        codes_RC = jax.lax.slice_in_dim(codes_RK, i * x_GC.shape[-1], (i + 1) * x_GC.shape[-1], axis=1)
        share = jnp.einsum("...c,rc->...r", x_GC[..., i, :], codes_RC, preferred_element_type=jnp.float32)
        total += _scaled(share, x_GC[..., i, :], scales_GR[i], None if zeros_GR is None else zeros_GR[i])
    return total.astype(x.dtype)


def _scaled(share: jax.Array, x: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
    """What blocks x [..., C] give with their codes, `share` [..., R], as what they give with the codes' numbers."""
    zero_points, offsets = _zeros(zeros)
    if zero_points is not None:
        share -= x.astype(jnp.float32).sum(-1)[..., None] * zero_points.astype(jnp.float32)
    share *= scales
    return share if offsets is None else share + x.astype(jnp.float32).sum(-1)[..., None] * offsets


def embedding_quantized(
    tokens: jax.Array, codes_RK: jax.Array, scales_GR: jax.Array, zeros_GR: jax.Array | None, format: str
) -> jax.Array:
    """Rows of a dequantised table, float32 [..., K]."""
    flat = tokens.reshape(-1)
    # To look up one row of narrow codes, XLA copies the whole table on a TPU; to look up two, it does not.
    rows = jnp.broadcast_to(flat, (2,)) if _is_one(flat.shape) else flat
    values = _widened(jnp.take(codes_RK, rows, 0, mode="clip")[: flat.shape[0]], format)
    values = values.reshape(*flat.shape, scales_GR.shape[0], -1)
    zero_points_GR, offsets_GR = _zeros(zeros_GR)
    if zero_points_GR is not None:
        values -= _columns(zero_points_GR, flat).astype(jnp.float32)[..., None]
    values *= _columns(scales_GR, flat)[..., None]
    if offsets_GR is not None:
        values += _columns(offsets_GR, flat)[..., None]
    return values.reshape(*tokens.shape, -1)


def _zeros(zeros: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """(zero points, offsets), of which there is one at most."""
    is_offsets = zeros is not None and jnp.issubdtype(zeros.dtype, jnp.floating)
    return (None, zeros) if is_offsets else (zeros, None)


def _columns(x_GR: jax.Array, wanted_T: jax.Array) -> jax.Array:
    """Columns of a wide array, [T, G]. For one, a masked sum reads the array once, also spread over chips."""
    wanted_T = jnp.clip(wanted_T, 0, x_GR.shape[1] - 1)
    if not _is_one(wanted_T.shape):
        return jnp.take(x_GR, wanted_T, 1, mode="clip").transpose()
    is_wanted_R = jnp.arange(x_GR.shape[1]) == wanted_T[0]
    return jnp.where(is_wanted_R, x_GR.astype(jnp.float32), 0).sum(1)[None]


def _is_one(shape: tuple[Any, ...]) -> bool:
    """Whether a shape, which may be symbolic, is known to hold one thing."""
    return all(isinstance(size, int) for size in shape) and math.prod(shape) == 1
