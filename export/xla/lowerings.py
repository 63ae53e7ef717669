"""Every operation in jax: functions of arrays and numbers, with the arguments that the graph gives.

Fused operations follow their bodies in `graphs.ops`. What is narrower than float32 is computed in float32 and rounded
once, as PyTorch does on CPUs; products of matrices add up in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from transom.export.lowering import Table
from transom.export.xla import attention, experts, summaries
from transom.export.xla.narrow import embedding_quantized, linear_quantized
from transom.formats.rounding import FLOAT8_MAX
from transom.graphs import ops
from transom.graphs.match import aten

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: jnp.float32,
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.int64: jnp.int32,  # jax has no wider integers unless asked for; positions and ids need none
    torch.int32: jnp.int32,
    torch.int8: jnp.int8,
    torch.uint8: jnp.uint8,
    torch.bool: jnp.bool_,
}

TABLE = Table()

COUNTED = frozenset(
    {
        ops.WRITE_CACHE, ops.ATTENTION, ops.ATTEND, ops.CAUSAL_CONVOLUTION, ops.STATE_SPACE, ops.TOKEN_SHIFT,
        ops.DELTA_RULE,
    }
)  # fmt: skip
"""Operations that must know how many of the new tokens are no padding; their lowerings take it as `count`."""


def _rounded_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute in float32 what has a narrower dtype."""

    def lower(*args: Any, **kwargs: Any) -> Any:
        dtype = jnp.result_type(*args)
        if dtype not in (jnp.bfloat16, jnp.float16):
            return function(*args, **kwargs)
        wide = [value.astype(jnp.float32) if isinstance(value, jax.Array) else value for value in args]
        return function(*wide, **kwargs).astype(dtype)

    return lower


def _scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Addition or subtraction, with the factor that PyTorch allows."""
    return lambda left, right, alpha=1: function(left, right if alpha == 1 else right * alpha)


for _target, _function in (
    (aten.add.Tensor, _scaled(jnp.add)),
    (aten.sub.Tensor, _scaled(jnp.subtract)),
    (aten.mul.Tensor, jnp.multiply),
    (aten.div.Tensor, jnp.true_divide),
    (aten.pow.Scalar, jnp.power),
    (aten.pow.Tensor_Scalar, jnp.power),
    (aten.reciprocal.default, jnp.reciprocal),
    (aten.rsqrt.default, jax.lax.rsqrt),
    (aten.cos.default, jnp.cos),
    (aten.sin.default, jnp.sin),
    (aten.log.default, jnp.log),
    (aten.floor.default, jnp.floor),
    (aten.tanh.default, jnp.tanh),
    (aten.sigmoid.default, jax.nn.sigmoid),
    (aten.silu.default, jax.nn.silu),
    (aten.relu.default, jax.nn.relu),
    (aten.softplus.default, jax.nn.softplus),
):
    TABLE.lowers(_target)(_rounded_once(_function))
for _target, _plain in (
    (aten.remainder.Scalar, jnp.remainder),
    (aten.ge.Scalar, jnp.greater_equal),
    (aten.le.Tensor, jnp.less_equal),
    (aten.lt.Scalar, jnp.less),
    (aten.__and__.Tensor, jnp.bitwise_and),
    (aten.bitwise_not.default, jnp.bitwise_not),
    (aten.unsqueeze.default, jnp.expand_dims),
    (aten.transpose.int, jnp.swapaxes),
    (aten.permute.default, jnp.transpose),
    (aten.where.self, jnp.where),
    (aten.clamp.default, jnp.clip),
):
    TABLE.lowers(_target)(_plain)
TABLE.lowers(operator.getitem)(operator.getitem)


@TABLE.lowers(aten.to.dtype)
def _to(x: jax.Array, dtype: torch.dtype) -> jax.Array:
    return x.astype(DTYPES[dtype])


@TABLE.lowers(aten.type_as.default)
def _type_as(x: jax.Array, other: jax.Array) -> jax.Array:
    return x.astype(other.dtype)


@TABLE.lowers(aten._assert_tensor_metadata.default)
def _nothing(*args: Any, **kwargs: Any) -> None:
    """The trace has checked it."""


@TABLE.lowers(aten.sym_size.int)
def _size(x: jax.Array, axis: int) -> Any:
    return x.shape[axis]


@TABLE.lowers(aten.arange.default)
def _arange(stop: int, dtype: torch.dtype = torch.int64, **where: Any) -> jax.Array:
    return jnp.arange(stop, dtype=DTYPES[dtype])


@TABLE.lowers(aten.arange.start_step)
def _arange_step(start: int, stop: int, step: int = 1, dtype: torch.dtype = torch.int64, **where: Any) -> jax.Array:
    return jnp.arange(start, stop, step, dtype=DTYPES[dtype])


@TABLE.lowers(aten.view.default, aten.reshape.default)
def _reshape(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jnp.reshape(x, tuple(shape))


@TABLE.lowers(aten.flatten.using_ints)
def _flatten(x: jax.Array, first: int = 0, last: int = -1) -> jax.Array:
    last %= x.ndim
    return jnp.reshape(x, (*x.shape[:first], -1, *x.shape[last + 1 :]))


@TABLE.lowers(aten.mean.dim)
def _mean(x: jax.Array, axes: Sequence[int], keepdim: bool = False) -> jax.Array:
    return jnp.mean(x, tuple(axes), dtype=jnp.float32, keepdims=keepdim).astype(x.dtype)


@TABLE.lowers(aten.sum.dim_IntList)
def _sum(x: jax.Array, axes: Sequence[int], keepdim: bool = False) -> jax.Array:
    return jnp.sum(x, tuple(axes), dtype=jnp.float32, keepdims=keepdim).astype(x.dtype)


@TABLE.lowers(aten.split_with_sizes.default)
def _split(x: jax.Array, sizes: Sequence[int], axis: int = 0) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis)


@TABLE.lowers(aten.chunk.default)
def _chunk(x: jax.Array, count: int, axis: int = 0) -> list[jax.Array]:
    step = -(-x.shape[axis] // count)
    return jnp.split(x, list(range(step, x.shape[axis], step)), axis)


@TABLE.lowers(aten.cat.default)
def _cat(parts: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    return jnp.concatenate(parts, axis)


@TABLE.lowers(aten.select.int)
def _select(x: jax.Array, axis: int, index: int) -> jax.Array:
    return jax.lax.index_in_dim(x, index, axis, keepdims=False)


@TABLE.lowers(aten.index_select.default)
def _index_select(x: jax.Array, axis: int, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis, mode="clip")


@TABLE.lowers(aten.index.Tensor)
def _index(vector: jax.Array, indices: Sequence[jax.Array]) -> jax.Array:
    (index,) = indices
    return jnp.take(vector, index, 0, mode="clip")


@TABLE.lowers(aten.index_copy.default)
def _index_copy(x: jax.Array, axis: int, index: jax.Array, source: jax.Array) -> jax.Array:
    return x.at[(slice(None),) * axis + (index,)].set(source)


@TABLE.lowers(aten.repeat_interleave.self_int)
def _repeat(x: jax.Array, count: int, axis: int) -> jax.Array:
    return jnp.repeat(x, count, axis)


@TABLE.lowers(aten.masked_fill.Scalar)
def _masked_fill(x: jax.Array, mask: jax.Array, value: float) -> jax.Array:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


@TABLE.lowers(aten.softmax.int)
def _softmax(x: jax.Array, axis: int) -> jax.Array:
    return jax.nn.softmax(x.astype(jnp.float32), axis).astype(x.dtype)


@TABLE.lowers(aten.gelu.default)
def _gelu(x: jax.Array, approximate: str = "none") -> jax.Array:
    return jax.nn.gelu(x.astype(jnp.float32), approximate=approximate == "tanh").astype(x.dtype)


@TABLE.lowers(aten.matmul.default)
def _matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32).astype(left.dtype)


@TABLE.lowers(aten.linear.default)
def _linear(x: jax.Array, weight_RK: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`x @ weight.T + bias`."""
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(x, weight_RK, axes, preferred_element_type=jnp.float32)
    return (product if bias is None else product + bias).astype(x.dtype)


@TABLE.lowers(aten.embedding.default)
def _embedding(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take(table, tokens, 0, mode="clip")


@TABLE.lowers(aten.layer_norm.default)
def _layer_norm(
    x: jax.Array,
    shape: Sequence[int],
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> jax.Array:
    axes, wide = tuple(range(-len(shape), 0)), x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)
    scaled = normed if weight is None else normed * weight.astype(jnp.float32)
    return (scaled if bias is None else scaled + bias.astype(jnp.float32)).astype(x.dtype)


@TABLE.lowers(ops.RMS_NORM)
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), -1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + eps) * weight.astype(jnp.float32)).astype(x.dtype)


@TABLE.lowers(ops.ROTARY)
def _rotary(
    x: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array, heads_first: bool, interleaved: bool = False
) -> jax.Array:
    cos, sin = (table if heads_first else table[:, None] for table in (cos_TH, sin_TH))
    wide = x.astype(jnp.float32)
    low, high = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, -1)
    turned = low * cos - high * sin, high * cos + low * sin
    joined = jnp.stack(turned, -1).reshape(x.shape) if interleaved else jnp.concatenate(turned, -1)
    return joined.astype(x.dtype)


@TABLE.lowers(ops.WRITE_CACHE)
def _write_cache(
    cache_BKSH: jax.Array, new: jax.Array, start: jax.Array, *, heads_first: bool, count: jax.Array, wraps: bool
) -> jax.Array:
    return attention.write(cache_BKSH, new if heads_first else new.swapaxes(1, 2), start, count, wraps=wraps)


TABLE.lowers(ops.ATTEND)(attention.attend)
TABLE.lowers(ops.FULL_ATTENTION)(attention.attend_fully)
TABLE.lowers(ops.CAUSAL_CONVOLUTION)(summaries.causal_convolution)
TABLE.lowers(ops.STATE_SPACE)(summaries.state_space)
TABLE.lowers(ops.TOKEN_SHIFT)(summaries.token_shift)
TABLE.lowers(ops.DELTA_RULE)(summaries.delta_rule)


@TABLE.lowers(ops.ATTENTION)
def _attention(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    start: jax.Array | None,
    until_T: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
    segment: int = 0,
    dilation: int = 1,
    count: jax.Array,
) -> jax.Array:
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    first, steps_S = 0 if start is None else start, jnp.arange(S)
    last = S - 1 if start is None else start + count - 1
    keys_S = last - jnp.remainder(last - steps_S, S)
    positions_T1 = (first + jnp.arange(T))[:, None]
    seen_TS = (keys_S >= 0) & (keys_S <= (positions_T1 if until_T is None else until_T[:, None]))
    mask = ops.Mask(window=window, segment=segment, dilation=dilation)
    seen_TS = attention.narrowed(seen_TS, positions_T1, keys_S, mask)
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T, H)
    rule = attention.Scores.of(scale, softcap, sinks_N, K)
    scores = jnp.where(seen_TS, rule.between(q_BKGTH, k_BKSH), attention.HIDDEN)
    weights = rule.weights(scores).astype(v_BKSH.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH, preferred_element_type=jnp.float32)
    return out.reshape(B, N, T, v_BKSH.shape[3]).astype(q_BNTH.dtype)


@TABLE.lowers(ops.LINEAR_QUANTIZED)
def _linear_quantized(
    x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, format: str
) -> jax.Array:
    return linear_quantized(x, codes, scales, zeros, format)


@TABLE.lowers(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(
    tokens: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, format: str
) -> jax.Array:
    return embedding_quantized(tokens, codes, scales, zeros, format)


TABLE.lowers(ops.EXPERTS)(experts.experts)
TABLE.lowers(ops.EXPERTS_QUANTIZED)(experts.experts_quantized)


@TABLE.lowers(aten.topk.default)
def _topk(x: jax.Array, count: int, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    values, indices = jax.lax.top_k(jnp.moveaxis(x, axis, -1), count)
    return jnp.moveaxis(values, -1, axis), jnp.moveaxis(indices, -1, axis)


@TABLE.lowers(ops.ROUND_ACTIVATIONS)
def _round_activations(x: jax.Array, scale: float, format: str) -> jax.Array:
    # Clamped first: what is out of range would become NaN.
    scaled = jnp.clip(x.astype(jnp.float32) / scale, -FLOAT8_MAX, FLOAT8_MAX)
    return (scaled.astype(getattr(jnp, format)).astype(jnp.float32) * scale).astype(x.dtype)
