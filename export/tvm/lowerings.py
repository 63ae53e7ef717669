"""Lowering of every operation that the target's passes leave."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, te

from transom.export.lowering import Table
from transom.export.tvm.emitter import Emitter, dtype_name, is_symbol
from transom.export.tvm.kernels import attention, experts, linear, quantized, rows, summaries
from transom.formats.quantized import block_of
from transom.graphs import ops
from transom.graphs.match import arguments, aten, is_call, is_transpose
from transom.graphs.node import Node, is_node

TABLE = Table()


@TABLE.lowers(aten.sym_size.int)
def _size(emitter: Emitter, node: Node) -> None:
    """Sizes are read from the shapes that hold them, where they are needed."""


@TABLE.lowers(aten.arange.default)
def _arange(emitter: Emitter, node: Node) -> Any:
    shape = emitter.shape(node)
    return emitter.builder.emit_te(lambda: te.compute(shape, lambda index: tvm.tirx.Cast("int64", index), "steps"))


def _operand(emitter: Emitter, node: Node, value: Any) -> Any:
    if not is_node(value):
        return relax.const(value, dtype_name(node.meta["val"].dtype))
    if emitter.is_batched(value) and value.meta["val"].dim() > 3 and value.meta["val"].shape != node.meta["val"].shape:
        raise emitter.refuse(node, "heads are spread over an axis that rows do not have")
    return emitter.value(value)


def _binary(operation: Any) -> Any:
    def lower(emitter: Emitter, node: Node) -> Any:
        left, right = (_operand(emitter, node, value) for value in node.args[:2])
        if (alpha := node.kwargs.get("alpha", 1)) != 1:
            right = relax.op.multiply(right, relax.const(alpha, dtype_name(node.meta["val"].dtype)))
        return emitter.builder.emit(operation(left, right))

    return lower


for _target, _operation in (
    (aten.add.Tensor, relax.op.add),
    (aten.sub.Tensor, relax.op.subtract),
    (aten.mul.Tensor, relax.op.multiply),
    (aten.div.Tensor, relax.op.divide),
):
    TABLE.lowers(_target)(_binary(_operation))


def _unary(operation: Any) -> Any:
    def lower(emitter: Emitter, node: Node) -> Any:
        return emitter.builder.emit(operation(emitter.value(node.args[0])))

    return lower


for _target, _operation in (
    (aten.cos.default, relax.op.cos),
    (aten.sin.default, relax.op.sin),
    (aten.log.default, relax.op.log),
    (aten.floor.default, relax.op.floor),
    (aten.sigmoid.default, relax.op.sigmoid),
    (aten.silu.default, relax.op.nn.silu),
):
    TABLE.lowers(_target)(_unary(_operation))


@TABLE.lowers(aten.gelu.default)
def _gelu(emitter: Emitter, node: Node) -> Any:
    return _activated(emitter, node, "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")


@TABLE.lowers(aten.tanh.default)
def _tanh(emitter: Emitter, node: Node) -> Any:
    return _activated(emitter, node, "tanh")


@TABLE.lowers(aten.softplus.default)
def _softplus(emitter: Emitter, node: Node) -> Any:
    return _activated(emitter, node, "softplus")


def _activated(emitter: Emitter, node: Node, name: str) -> Any:
    k = emitter.width(node)
    (result,) = emitter.call(
        ("activated", k, name),
        lambda: rows.activated(k, name, emitter.tile),
        (emitter.value(node.args[0]),),
        emitter.shape(node),
    )
    return result


@TABLE.lowers(aten.clamp.default)
def _clamp(emitter: Emitter, node: Node) -> Any:
    x, *bounds = node.args
    named, value = dict(zip(("min", "max"), bounds, strict=False)) | node.kwargs, emitter.value(x)
    for name, operation in (("min", relax.op.maximum), ("max", relax.op.minimum)):
        if named.get(name) is not None:
            value = emitter.builder.emit(operation(value, _operand(emitter, node, named[name])))
    return value


@TABLE.lowers(aten.lt.Scalar)
def _less(emitter: Emitter, node: Node) -> Any:
    x, limit = node.args
    return emitter.builder.emit(relax.op.less(emitter.value(x), relax.const(limit, dtype_name(x.meta["val"].dtype))))


@TABLE.lowers(aten.where.self)
def _where(emitter: Emitter, node: Node) -> Any:
    return emitter.builder.emit(relax.op.where(*(_operand(emitter, node, value) for value in node.args)))


@TABLE.lowers(aten.to.dtype, aten._to_copy.default)
def _cast(emitter: Emitter, node: Node) -> Any:
    return emitter.builder.emit(relax.op.astype(emitter.value(node.args[0]), dtype_name(node.meta["val"].dtype)))


@TABLE.lowers(aten.unsqueeze.default)
def _unsqueeze(emitter: Emitter, node: Node) -> Any:
    x, axis = node.args
    if emitter.is_batched(x):
        if x.meta["val"].dim() > 2 or axis not in (2, -1):
            raise emitter.refuse(node, "rows have no further axes")
        axis = 1
    return emitter.builder.emit(relax.op.expand_dims(emitter.value(x), axis))


@TABLE.lowers(aten.view.default, aten.reshape.default, aten.flatten.using_ints)
def _reshape(emitter: Emitter, node: Node) -> Any:
    old, new = node.args[0], node
    if emitter.is_batched(old) and emitter.is_batched(new) and str(emitter.shape(old)) == str(emitter.shape(new)):
        return emitter.value(old)
    if any(is_symbol(size) for size in old.meta["val"].shape):
        raise emitter.refuse(node, "only the numbers of a row can be grouped anew")
    return _held(emitter, node, emitter.value(old))


def _held(emitter: Emitter, node: Node, value: Any) -> Any:
    """A node's value in the shape in which values are held."""
    return emitter.builder.emit(relax.op.reshape(value, emitter.shape(node)))


def _whole(emitter: Emitter, node: Node) -> Any:
    """A node's value with all of its axes."""
    return emitter.builder.emit(relax.op.reshape(emitter.value(node), [*map(emitter.size, node.meta["val"].shape)]))


@TABLE.lowers(aten.permute.default)
def _permute(emitter: Emitter, node: Node) -> Any:
    x, axes = node.args
    return _held(emitter, node, emitter.builder.emit(relax.op.permute_dims(_whole(emitter, x), list(axes))))


@TABLE.lowers(aten.mean.dim)
def _mean(emitter: Emitter, node: Node) -> Any:
    x, axes, *_ = node.args
    return _held(emitter, node, emitter.builder.emit(relax.op.mean(_whole(emitter, x), list(axes))))


@TABLE.lowers(aten.transpose.int)
def _transpose(emitter: Emitter, node: Node) -> Any:
    """Heads before tokens, as a tap shows them; kernels take no such values.

    Those of `FULL_ATTENTION` are told where heads are, and find them where they were.
    """
    users = [user.target for user in node.users]
    if is_transpose(node, 1, 2) and (is_call(node.args[0], ops.FULL_ATTENTION) or {*users} == {ops.FULL_ATTENTION}):
        return emitter.value(node.args[0])
    if not is_transpose(node, 1, 2) or any(user.op != "output" for user in node.users):
        raise emitter.refuse(node, "only taps may have heads before tokens")
    _, tokens, heads, h = (emitter.size(size) for size in node.args[0].meta["val"].shape)
    grouped = emitter.builder.emit(relax.op.reshape(emitter.value(node.args[0]), (tokens, heads, h)))
    return emitter.builder.emit(relax.op.permute_dims(grouped, (1, 0, 2)))


@TABLE.lowers(aten.split_with_sizes.default)
def _split(emitter: Emitter, node: Node) -> list[Any]:
    source, sizes, axis = node.args
    rank = source.meta["val"].dim()
    if not emitter.is_batched(source) or rank != 3 or axis % rank != 2:
        raise emitter.refuse(node, "only rows can be split")
    cuts = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    pieces = emitter.builder.emit(relax.op.split(emitter.value(source), cuts, axis=1))
    return [emitter.builder.emit(relax.TupleGetItem(pieces, index)) for index in range(len(sizes))]


@TABLE.lowers(aten.embedding.default)
def _embedding(emitter: Emitter, node: Node) -> Any:
    return _select(emitter, node, emitter.value(node.args[0]), emitter.value(node.args[1]))


@TABLE.lowers(aten.index_select.default)
def _index_select(emitter: Emitter, node: Node) -> Any:
    source, axis, index = node.args
    if not emitter.is_batched(source) or axis != 1:
        raise emitter.refuse(node, "only rows can be selected")
    return _select(emitter, node, emitter.value(source), emitter.value(index))


def _select(emitter: Emitter, node: Node, source: Any, index: Any) -> Any:
    k = emitter.width(node)
    (result,) = emitter.call(
        ("select_rows", k), lambda: rows.table_rows(k, emitter.tile), (index, source), emitter.shape(node)
    )
    return result


@TABLE.lowers(aten.linear.default)
def _linear(emitter: Emitter, node: Node) -> Any:
    x, weight, *bias = node.args
    n, k = (int(size) for size in weight.meta["val"].shape)
    product = _product(emitter, node, x, emitter.value(weight), n, k)
    if not bias or bias[0] is None:
        return product
    return emitter.builder.emit(relax.op.add(product, emitter.value(bias[0])))


@TABLE.lowers(aten.matmul.default)
def _matmul(emitter: Emitter, node: Node) -> Any:
    x, weight = node.args
    if emitter.graph.weight_of(weight) is None or weight.meta["val"].dim() != 2:
        raise emitter.refuse(node, "only weights can be multiplied by")
    k, n = (int(size) for size in weight.meta["val"].shape)
    turned = emitter.builder.emit(relax.op.permute_dims(emitter.value(weight), (1, 0)))
    return _product(emitter, node, x, turned, n, k)


def _product(emitter: Emitter, node: Node, x: Node, weight_NK: Any, n: int, k: int) -> Any:
    make, name = (linear.matrix_product, "linear_rows")
    if emitter.is_single(node):
        make, name = linear.vector_product, "linear_row"
    (product,) = emitter.call(
        (name, n, k),
        lambda: make(n, k, emitter.tile),
        (emitter.value(x), weight_NK),
        emitter.shape(node),
    )
    return product


def _codes(codes: Node, zeros: Node | None, format: str) -> quantized.Codes:
    n, blocks, _ = (int(size) for size in codes.meta["val"].shape)
    block = block_of(codes.meta["val"], format)
    has_offsets = zeros is not None and zeros.meta["val"].is_floating_point()
    symmetric = zeros is None or has_offsets
    return quantized.Codes(n=n, blocks=blocks, block=block, format=format, symmetric=symmetric, has_offsets=has_offsets)


def _with_codes(emitter: Emitter, node: Node, name: str, make: Any) -> Any:
    x, codes, scales, zeros, format = node.args
    layout = _codes(codes, zeros, format)
    inputs = [emitter.value(value) for value in (x, codes, scales, codes if zeros is None else zeros)]
    (result,) = emitter.call((name, layout), lambda: make(layout, emitter.tile), inputs, emitter.shape(node))
    return result


@TABLE.lowers(ops.LINEAR_QUANTIZED)
def _linear_quantized(emitter: Emitter, node: Node) -> Any:
    if emitter.is_single(node):
        return _with_codes(emitter, node, "linear_codes_row", quantized.vector_product)
    return _with_codes(emitter, node, "linear_codes_rows", quantized.matrix_product)


@TABLE.lowers(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(emitter: Emitter, node: Node) -> Any:
    return _with_codes(emitter, node, "embedding_codes", lambda layout, tile: quantized.table_rows(layout))


@TABLE.lowers(aten.layer_norm.default)
def _layer_norm(emitter: Emitter, node: Node) -> Any:
    x, shape, *rest = node.args
    weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
    if len(shape) != 1 or x.meta["val"].dim() != 3 or weight is None:
        raise emitter.refuse(node, "rows are normalised, with a weight")
    h, biased = emitter.width(x), bias is not None
    (result,) = emitter.call(
        ("layer_norm", h, eps, biased),
        lambda: rows.layer_norm(h, eps, emitter.tile, biased=biased),
        [emitter.value(value) for value in (x, weight, bias if biased else weight)],
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
    scale, window, softcap, until, sinks = (given[name] for name in ("scale", "window", "softcap", "until", "sinks_N"))
    heads, h = (int(size) for size in node.args[0].meta["val"].shape[2:])
    key_heads = int(node.args[1].meta["val"].shape[2])
    if (value_width := int(node.args[2].meta["val"].shape[3])) != h:
        raise emitter.refuse(node, f"values are {value_width} wide, keys {h}: choose 'onnx'")
    single = emitter.is_single(node.args[0])
    # One token sees no later one.
    images, has_sinks = until is not None and not single, sinks is not None
    inputs = [*node.args[:6], *([until] if images else []), sinks if has_sinks else node.args[0]]
    rule = attention.Rule(window=window, scale=scale, softcap=softcap, images=images, sinks=has_sinks)
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


@TABLE.lowers(aten.topk.default)
def _topk(emitter: Emitter, node: Node) -> list[Any]:
    x, chosen, *axis = node.args
    if not emitter.is_batched(x) or x.meta["val"].dim() != 3 or (axis and axis[0] not in (-1, 2)):
        raise emitter.refuse(node, "only the largest numbers of a row can be found")
    count, shape = emitter.width(x), [emitter.shape(x)[0], chosen]
    return emitter.call(
        ("largest", count, chosen),
        lambda: experts.largest(count, chosen),
        (emitter.value(x),),
        shape,
        shape,
        dtypes=("float32", "int64"),
    )


@TABLE.lowers(aten.softmax.int)
def _softmax(emitter: Emitter, node: Node) -> Any:
    x, axis, *_ = node.args
    rank = x.meta["val"].dim()
    if not emitter.is_batched(x) or rank != 3 or axis % rank != 2:
        raise emitter.refuse(node, "only rows add up to one")
    return emitter.builder.emit(relax.op.nn.softmax(emitter.value(x), -1))


@TABLE.lowers(ops.EXPERTS)
def _experts(emitter: Emitter, node: Node) -> Any:
    _, _, _, gate_up, down, *biases, activation = node.args

    def product(matrix: Node, bias: Node | None, count: int, repeat: int, x: Any, chosen: Any) -> Any:
        rows_of_all, k = (int(size) for size in matrix.meta["val"].shape)
        n, weight = rows_of_all // count, emitter.value(matrix)
        inputs = (x, chosen, weight, weight if bias is None else emitter.value(bias))
        key = ("chosen_rows", n, k, count, repeat, bias is not None)
        return key, n, lambda: experts.chosen_product(n, k, count, repeat, bias is not None, emitter.tile), inputs

    return _mixture(emitter, node, product, (gate_up, down), biases, activation)


@TABLE.lowers(ops.EXPERTS_QUANTIZED)
def _experts_quantized(emitter: Emitter, node: Node) -> Any:
    parts = node.args[3:]

    def product(matrix: Any, bias: Node | None, count: int, repeat: int, x: Any, chosen: Any) -> Any:
        codes, scales, zeros, format = matrix
        layout = _codes(codes, zeros, format)
        n = layout.n // count
        weights = [emitter.value(part) for part in (codes, scales, codes if zeros is None else zeros)]
        inputs = (x, chosen, *weights, weights[1] if bias is None else emitter.value(bias))
        key = ("chosen_codes", layout, n, repeat, bias is not None)
        return key, n, lambda: experts.chosen_codes_product(layout, n, repeat, bias is not None, emitter.tile), inputs

    return _mixture(emitter, node, product, (parts[:4], parts[4:8]), parts[8:10], parts[10])


def _mixture(emitter: Emitter, node: Node, product: Any, matrices: Any, biases: Any, activation: str) -> Any:
    """Both products of every token and each of its choices, and their sum."""
    x, choices, weights = (emitter.value(value) for value in node.args[:3])
    tokens, width = emitter.shape(node)
    chosen = int(node.args[1].meta["val"].shape[-1])
    first = matrices[1][0] if isinstance(matrices[1], (list, tuple)) else matrices[1]
    count, many = int(first.meta["val"].shape[0]) // width, tokens * chosen
    flat = emitter.builder.emit(relax.op.reshape(choices, [many]))
    value = x
    key, n, make, inputs = product(matrices[0], biases[0], count, chosen, x, flat)
    (packed,) = emitter.call(key, make, inputs, [many, n])
    (value,) = emitter.call(
        ("gated", n // 2, activation, False),
        lambda: rows.gated(n // 2, activation, emitter.tile),
        (packed,),
        [many, n // 2],
    )
    key, _, make, inputs = product(matrices[1], biases[1], count, 1, value, flat)
    (value,) = emitter.call(key, make, inputs, [many, width])
    (total,) = emitter.call(
        ("weighted_sum", width, chosen),
        lambda: experts.weighted_sum(width, chosen, emitter.tile),
        (value, weights),
        [tokens, width],
    )
    return total


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
