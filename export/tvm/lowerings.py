"""Lowering of every operation that the target's passes leave."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from transom.export.lowering import Table
from transom.export.tvm.arithmetic import ARITHMETIC
from transom.export.tvm.emitter import Emitter
from transom.export.tvm.kernels import attention, rows, summaries
from transom.export.tvm.products import PRODUCTS
from transom.graphs import ops
from transom.graphs.masks import mask_of
from transom.graphs.match import arguments, aten, is_transpose
from transom.graphs.node import Node

TABLE = Table(ARITHMETIC | PRODUCTS)


@TABLE.lowers(aten.layer_norm.default)
def _layer_norm(emitter: Emitter, node: Node) -> Any:
    x, shape, *rest = node.args
    weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
    if len(shape) != 1 or x.meta["val"].dim() < 3:
        raise emitter.refuse(node, "rows are normalised, or the heads in them")
    h, biased = int(shape[0]), bias is not None
    heads = emitter.width(x) // h
    factors = relax.const(np.ones(h, np.float32)) if weight is None else emitter.value(weight)
    (result,) = emitter.call(
        ("layer_norm", heads, h, eps, biased),
        lambda: rows.layer_norm(heads, h, eps, emitter.tile, biased=biased),
        [emitter.value(x), factors, emitter.value(bias) if biased else factors],
        emitter.shape(node),
    )
    return result


@TABLE.lowers(ops.RMS_NORM)
def _rms_norm(emitter: Emitter, node: Node) -> Any:
    x, weight, eps = node.args
    h = int(x.meta["val"].shape[-1])
    heads = emitter.width(x) // h
    (result,) = emitter.call(
        ("rms_norm", heads, h, eps),
        lambda: rows.rms_norm(heads, h, eps, emitter.tile),
        (emitter.value(x), emitter.value(weight)),
        emitter.shape(node),
    )
    return result


@TABLE.lowers(ops.ADD_RMS_NORM)
def _add_rms_norm(emitter: Emitter, node: Node) -> list[Any]:
    x, residual, weight, eps = node.args
    if x.meta["val"].dim() != 3:
        raise emitter.refuse(node, "sums are normalised by rows")
    h = emitter.width(x)
    return emitter.call(
        ("add_rms_norm", h, eps),
        lambda: rows.add_rms_norm(h, eps, emitter.tile),
        (emitter.value(x), emitter.value(residual), emitter.value(weight)),
        emitter.shape(x),
        emitter.shape(x),
    )


@TABLE.lowers(ops.ROTARY)
def _rotary(emitter: Emitter, node: Node) -> Any:
    x, cos, sin, heads_first, *pairs = node.args
    if heads_first:
        raise emitter.refuse(node, "heads must come after tokens")
    heads, h = (int(size) for size in x.meta["val"].shape[2:])
    (result,) = emitter.call(
        ("rotary", heads, h, any(pairs)),
        lambda: rows.rotary(heads, h, emitter.tile, interleaved=any(pairs)),
        (emitter.value(x), emitter.value(cos), emitter.value(sin)),
        emitter.shape(node),
    )
    return result


@TABLE.lowers(ops.GATED)
def _gated(emitter: Emitter, node: Node) -> Any:
    packed, activation = node.args
    k, single = emitter.width(node), emitter.is_single(node)
    (result,) = emitter.call(
        ("gated", k, activation, single),
        lambda: rows.gated(k, activation, emitter.tile, single=single),
        (emitter.value(packed),),
        emitter.shape(node),
    )
    return result


@TABLE.lowers(ops.ATTEND)
def _attend(emitter: Emitter, node: Node) -> Any:
    given = arguments(node)
    scale, softcap, until, sinks = (given[name] for name in ("scale", "softcap", "until", "sinks_N"))
    heads, h = (int(size) for size in node.args[0].meta["val"].shape[2:])
    key_heads = int(node.args[1].meta["val"].shape[2])
    if (value_width := int(node.args[2].meta["val"].shape[3])) != h:
        raise emitter.refuse(node, f"values are {value_width} wide, keys {h}: choose 'onnx'")
    single = emitter.is_single(node.args[0])
    # One token sees no later one.
    images, has_sinks = until is not None and not single, sinks is not None
    inputs = [*node.args[:6], *([until] if images else []), sinks if has_sinks else node.args[0]]
    rule = attention.Rule(mask=mask_of(node), scale=scale, softcap=softcap, images=images, sinks=has_sinks)
    (attended,) = emitter.call(
        ("attend", heads, key_heads, h, rule, single),
        lambda: attention.attend(heads, key_heads, h, rule, emitter.tile, single=single),
        [emitter.value(tensor) for tensor in inputs],
        emitter.shape(node),
    )
    return attended


@TABLE.lowers(ops.FULL_ATTENTION)
def _full_attention(emitter: Emitter, node: Node) -> Any:
    q, _, v = node.args
    heads, h = (int(q.meta["val"].shape[axis]) for axis in (1, 3))
    key_heads, value_width = (int(v.meta["val"].shape[axis]) for axis in (1, 3))
    if not all(is_transpose(value, 1, 2) for value in (*node.args, *node.users)) or value_width != h:
        raise emitter.refuse(node, "heads must come after tokens, and be of one width")
    (attended,) = emitter.call(
        ("attend_fully", heads, key_heads, h, node.kwargs["scale"]),
        lambda: attention.attend_fully(heads, key_heads, h, node.kwargs["scale"], emitter.tile),
        [emitter.value(value) for value in node.args],
        emitter.shape(q.args[0]),
    )
    return attended


@TABLE.lowers(ops.WRITE_CACHE)
def _write_cache(emitter: Emitter, node: Node) -> Any:
    cache, new, start = node.args
    if node.kwargs["heads_first"]:
        raise emitter.refuse(node, "heads must come after tokens")
    key_heads, h = (int(size) for size in new.meta["val"].shape[2:])
    inputs = [emitter.value(value) for value in (new, cache, start)]
    (written,) = emitter.call(
        ("write_cache", key_heads, h), lambda: attention.write_cache(key_heads, h, emitter.tile), inputs, in_place=(1,)
    )
    return written


@TABLE.lowers(ops.CAUSAL_CONVOLUTION)
def _causal_convolution(emitter: Emitter, node: Node) -> list[Any]:
    x, kept, start, weight, bias = node.args
    channels, _, taps = (int(size) for size in weight.meta["val"].shape)
    biased, single = bias is not None, emitter.is_single(x)
    return emitter.call(
        ("convolve", channels, taps, biased, single),
        lambda: summaries.causal_convolution(channels, taps, emitter.tile, biased=biased, single=single),
        [emitter.value(value) for value in (x, kept, start, weight, bias if biased else weight)],
        emitter.shape(x),
        in_place=(1,),
    )


@TABLE.lowers(ops.STATE_SPACE)
def _state_space(emitter: Emitter, node: Node) -> list[Any]:
    x, _, _, keys, *_ = node.args
    heads, h = (int(size) for size in x.meta["val"].shape[2:])
    groups, z = (int(size) for size in keys.meta["val"].shape[2:])
    return emitter.call(
        ("scan", heads, h, groups, z),
        lambda: summaries.state_space(heads, h, groups, z, emitter.tile),
        [emitter.value(value) for value in node.args],
        emitter.shape(x),
        in_place=(6,),
    )


@TABLE.lowers(ops.TOKEN_SHIFT)
def _token_shift(emitter: Emitter, node: Node) -> list[Any]:
    x = node.args[0]
    channels, single = emitter.width(x), emitter.is_single(x)
    return emitter.call(
        ("shift", channels, single),
        lambda: summaries.token_shift(channels, emitter.tile, single=single),
        [emitter.value(value) for value in node.args],
        emitter.shape(x),
        in_place=(1,),
    )


@TABLE.lowers(ops.DELTA_RULE)
def _delta_rule(emitter: Emitter, node: Node) -> list[Any]:
    keys, values = node.args[2:4]
    heads, h = (int(size) for size in keys.meta["val"].shape[2:])
    v = int(values.meta["val"].shape[3])
    return emitter.call(
        ("delta", heads, h, v),
        lambda: summaries.delta_rule(heads, h, v, emitter.tile),
        [emitter.value(value) for value in node.args],
        emitter.shape(values),
        in_place=(6,),
    )
