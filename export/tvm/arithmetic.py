"""Lowering of what computes number by number, and of changes of shape."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, te

from transom.export.lowering import Table
from transom.export.tvm.emitter import Emitter, dtype_name, is_symbol
from transom.export.tvm.kernels import rows
from transom.graphs import ops
from transom.graphs.match import aten, is_call, is_transpose
from transom.graphs.node import Node, is_node

ARITHMETIC = Table()


@ARITHMETIC.lowers(aten.sym_size.int)
def _size(emitter: Emitter, node: Node) -> None:
    """Sizes are read from the shapes that hold them, where they are needed."""


@ARITHMETIC.lowers(aten.arange.default)
def _arange(emitter: Emitter, node: Node) -> Any:
    shape = emitter.shape(node)
    return emitter.builder.emit_te(lambda: te.compute(shape, lambda index: tvm.tirx.Cast("int64", index), "steps"))


def _operand(emitter: Emitter, node: Node, value: Any) -> Any:
    if not is_node(value):
        return relax.const(value, dtype_name(node.meta["val"].dtype))
    if _is_spread(node):
        return _whole(emitter, value)
    shape = value.meta["val"].shape
    if emitter.is_batched(node) and not emitter.is_batched(value) and len(shape) > 2:
        # A parameter with an axis for the batch, which rows do not have.
        return emitter.builder.emit(relax.op.reshape(emitter.value(value), [*map(emitter.size, shape[1:])]))
    return emitter.value(value)


def _is_spread(node: Node) -> bool:
    """Whether a number of a head, say, is taken for all of its numbers, which rows alone do not tell."""
    shape = node.meta["val"].shape
    return len(shape) > 3 and any(value.meta["val"].shape not in ((), shape) for value in node.all_input_nodes)


def _spread(emitter: Emitter, node: Node, value: Any) -> Any:
    """Emit what was computed of `_operand`s."""
    result = emitter.builder.emit(value)
    return _shaped(emitter, node, result) if _is_spread(node) else result


def _binary(operation: Any) -> Any:
    def lower(emitter: Emitter, node: Node) -> Any:
        left, right = (_operand(emitter, node, value) for value in node.args[:2])
        if (alpha := node.kwargs.get("alpha", 1)) != 1:
            right = relax.op.multiply(right, relax.const(alpha, dtype_name(node.meta["val"].dtype)))
        return _spread(emitter, node, operation(left, right))

    return lower


for _target, _operation in (
    (aten.add.Tensor, relax.op.add),
    (aten.sub.Tensor, relax.op.subtract),
    (aten.mul.Tensor, relax.op.multiply),
    (aten.div.Tensor, relax.op.divide),
):
    ARITHMETIC.lowers(_target)(_binary(_operation))


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
    (aten.relu.default, relax.op.nn.relu),
):
    ARITHMETIC.lowers(_target)(_unary(_operation))


@ARITHMETIC.lowers(aten.gelu.default)
def _gelu(emitter: Emitter, node: Node) -> Any:
    return _activated(emitter, node, "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")


@ARITHMETIC.lowers(aten.tanh.default)
def _tanh(emitter: Emitter, node: Node) -> Any:
    return _activated(emitter, node, "tanh")


@ARITHMETIC.lowers(aten.softplus.default)
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


@ARITHMETIC.lowers(aten.clamp.default)
def _clamp(emitter: Emitter, node: Node) -> Any:
    x, *bounds = node.args
    named, value = dict(zip(("min", "max"), bounds, strict=False)) | node.kwargs, emitter.value(x)
    for name, operation in (("min", relax.op.maximum), ("max", relax.op.minimum)):
        if named.get(name) is not None:
            value = emitter.builder.emit(operation(value, _operand(emitter, node, named[name])))
    return value


@ARITHMETIC.lowers(aten.lt.Scalar)
def _less(emitter: Emitter, node: Node) -> Any:
    x, limit = node.args
    return emitter.builder.emit(relax.op.less(emitter.value(x), relax.const(limit, dtype_name(x.meta["val"].dtype))))


@ARITHMETIC.lowers(aten.where.self)
def _where(emitter: Emitter, node: Node) -> Any:
    return _spread(emitter, node, relax.op.where(*(_operand(emitter, node, value) for value in node.args)))


@ARITHMETIC.lowers(aten.to.dtype, aten._to_copy.default)
def _cast(emitter: Emitter, node: Node) -> Any:
    return emitter.builder.emit(relax.op.astype(emitter.value(node.args[0]), dtype_name(node.meta["val"].dtype)))


@ARITHMETIC.lowers(aten.unsqueeze.default)
def _unsqueeze(emitter: Emitter, node: Node) -> Any:
    x, axis = node.args
    if emitter.is_batched(x):
        if x.meta["val"].dim() > 2 or axis not in (2, -1):
            raise emitter.refuse(node, "rows have no further axes")
        axis = 1
    return emitter.builder.emit(relax.op.expand_dims(emitter.value(x), axis))


@ARITHMETIC.lowers(aten.view.default, aten.reshape.default, aten.flatten.using_ints)
def _reshape(emitter: Emitter, node: Node) -> Any:
    old, new = node.args[0], node
    if emitter.is_batched(old) and emitter.is_batched(new) and str(emitter.shape(old)) == str(emitter.shape(new)):
        return emitter.value(old)
    if any(is_symbol(size) for size in old.meta["val"].shape):
        raise emitter.refuse(node, "only the numbers of a row can be grouped anew")
    return _shaped(emitter, node, emitter.value(old))


def _shaped(emitter: Emitter, node: Node, value: Any) -> Any:
    """A node's value in the shape that other nodes expect of it (`Emitter.shape`)."""
    return emitter.builder.emit(relax.op.reshape(value, emitter.shape(node)))


def _whole(emitter: Emitter, node: Node) -> Any:
    """A node's value with all of its axes."""
    return emitter.builder.emit(relax.op.reshape(emitter.value(node), [*map(emitter.size, node.meta["val"].shape)]))


@ARITHMETIC.lowers(aten.permute.default)
def _permute(emitter: Emitter, node: Node) -> Any:
    x, axes = node.args
    return _shaped(emitter, node, emitter.builder.emit(relax.op.permute_dims(_whole(emitter, x), list(axes))))


def _reduced(operation: Any) -> Any:
    def lower(emitter: Emitter, node: Node) -> Any:
        x, axes, *_ = node.args
        return _shaped(emitter, node, emitter.builder.emit(operation(_whole(emitter, x), list(axes))))

    return lower


ARITHMETIC.lowers(aten.mean.dim)(_reduced(relax.op.mean))
ARITHMETIC.lowers(aten.sum.dim_IntList)(_reduced(relax.op.sum))


@ARITHMETIC.lowers(aten.transpose.int)
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


@ARITHMETIC.lowers(aten.split_with_sizes.default)
def _split(emitter: Emitter, node: Node) -> list[Any]:
    source, sizes, axis = node.args
    rank = source.meta["val"].dim()
    if not emitter.is_batched(source) or rank != 3 or axis % rank != 2:
        raise emitter.refuse(node, "only rows can be split")
    cuts = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    pieces = emitter.builder.emit(relax.op.split(emitter.value(source), cuts, axis=1))
    return [emitter.builder.emit(relax.TupleGetItem(pieces, index)) for index in range(len(sizes))]


@ARITHMETIC.lowers(aten.softmax.int)
def _softmax(emitter: Emitter, node: Node) -> Any:
    x, axis, *_ = node.args
    rank = x.meta["val"].dim()
    if not emitter.is_batched(x) or rank != 3 or axis % rank != 2:
        raise emitter.refuse(node, "only rows add up to one")
    return emitter.builder.emit(relax.op.nn.softmax(emitter.value(x), -1))
