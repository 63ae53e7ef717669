"""Lowering of every operation that the target's passes leave."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, te

from transom.export.lowering import Table
from transom.export.tvm.emitter import Emitter, dtype_name
from transom.export.tvm.kernels import attention, linear, quantized, rows
from transom.formats.quantized import block_of
from transom.graphs import ops
from transom.graphs.match import aten, is_transpose
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
    (aten.sigmoid.default, relax.op.sigmoid),
    (aten.silu.default, relax.op.nn.silu),
):
    TABLE.lowers(_target)(_unary(_operation))


@TABLE.lowers(aten.gelu.default)
def _gelu(emitter: Emitter, node: Node) -> Any:
    tanh = node.kwargs.get("approximate") == "tanh"
    return _unary(relax.op.nn.gelu_tanh if tanh else relax.op.nn.gelu)(emitter, node)


@TABLE.lowers(aten.to.dtype, aten._to_copy.default)
def _cast(emitter: Emitter, node: Node) -> Any:
    return emitter.builder.emit(relax.op.astype(emitter.value(node.args[0]), dtype_name(node.meta["val"].dtype)))


@TABLE.lowers(aten.unsqueeze.default)
def _unsqueeze(emitter: Emitter, node: Node) -> Any:
    if emitter.is_batched(node.args[0]):
        raise emitter.refuse(node, "rows have no further axes")
    return emitter.builder.emit(relax.op.expand_dims(emitter.value(node.args[0]), node.args[1]))


@TABLE.lowers(aten.view.default, aten.reshape.default)
def _reshape(emitter: Emitter, node: Node) -> Any:
    old, new = node.args[0], node
    if not (emitter.is_batched(old) and emitter.is_batched(new)) or str(emitter.shape(old)) != str(emitter.shape(new)):
        raise emitter.refuse(node, "only the numbers of a row can be grouped anew")
    return emitter.value(old)


@TABLE.lowers(aten.transpose.int)
def _transpose(emitter: Emitter, node: Node) -> Any:
    """Heads before tokens, as a tap shows them; kernels take no such values."""
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
    make, name = (linear.matrix_product, "linear_rows")
    if emitter.is_single(node):
        make, name = linear.vector_product, "linear_row"
    (product,) = emitter.call(
        (name, n, k),
        lambda: make(n, k, emitter.tile),
        (emitter.value(x), emitter.value(weight)),
        emitter.shape(node),
    )
    if not bias or bias[0] is None:
        return product
    return emitter.builder.emit(relax.op.add(product, emitter.value(bias[0])))


def _codes(codes: Node, zeros: Node | None, number: str) -> quantized.Codes:
    n, blocks, _ = (int(size) for size in codes.meta["val"].shape)
    block = block_of(codes.meta["val"], number)
    has_offsets = zeros is not None and zeros.meta["val"].is_floating_point()
    symmetric = zeros is None or has_offsets
    return quantized.Codes(n=n, blocks=blocks, block=block, number=number, symmetric=symmetric, has_offsets=has_offsets)


def _with_codes(emitter: Emitter, node: Node, name: str, make: Any) -> Any:
    x, codes, scales, zeros, number = node.args
    layout = _codes(codes, zeros, number)
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
    x, cos, sin, heads_first = node.args
    if heads_first:
        raise emitter.refuse(node, "heads must come after tokens")
    heads, h = (int(size) for size in x.meta["val"].shape[2:])
    (result,) = emitter.call(
        ("rotary", heads, h),
        lambda: rows.rotary(heads, h, emitter.tile),
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
    scale, window = node.kwargs["scale"], node.kwargs["window"]
    heads, h = (int(size) for size in node.args[0].meta["val"].shape[2:])
    key_heads = int(node.args[1].meta["val"].shape[2])
    if (value_width := int(node.args[2].meta["val"].shape[3])) != h:
        raise emitter.refuse(node, f"values are {value_width} wide, keys {h}: choose 'onnx'")
    single = emitter.is_single(node.args[0])
    (attended,) = emitter.call(
        ("attend", heads, key_heads, h, window, scale, single),
        lambda: attention.attend(heads, key_heads, h, window, scale, emitter.tile, single=single),
        [emitter.value(tensor) for tensor in node.args],
        emitter.shape(node),
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
