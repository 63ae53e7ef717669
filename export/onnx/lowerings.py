"""Lowerings that every ONNX dialect shares: standard operators up to opset 23."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from transom.export.lowering import Table
from transom.export.onnx.data import ELEMENT_TYPES
from transom.export.onnx.emitter import Emitter
from transom.graphs import ops
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node, is_node

SHARED = Table()


@SHARED.lowers(aten.embedding.default)
def _embedding(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("Gather", emitter.value(node.args[0]), emitter.value(node.args[1])))


def _operand(emitter: Emitter, value: Any, dtype: torch.dtype) -> str:
    if is_node(value):
        return emitter.value(value)
    return emitter.number(value, dtype)


def add_bias(emitter: Emitter, node: Node, product: str) -> str:
    """The product of a `linear`, with its bias if it has one."""
    bias = node.args[2] if len(node.args) > 2 else None
    return product if bias is None else str(emitter.op("Add", product, emitter.value(bias)))


def _binary(kind: str) -> Any:
    def lower(emitter: Emitter, node: Node) -> str:
        dtype = node.meta["val"].dtype
        left, right = (_operand(emitter, value, dtype) for value in node.args[:2])
        if (alpha := node.kwargs.get("alpha", 1)) != 1:
            right = emitter.op("Mul", right, _operand(emitter, alpha, dtype))
        return str(emitter.op(kind, left, right))

    return lower


def _unary(kind: str) -> Any:
    def lower(emitter: Emitter, node: Node) -> str:
        return str(emitter.op(kind, emitter.value(node.args[0])))

    return lower


for _target, _kind in (
    (aten.add.Tensor, "Add"),
    (aten.sub.Tensor, "Sub"),
    (aten.mul.Tensor, "Mul"),
    (aten.div.Tensor, "Div"),
):
    SHARED.lowers(_target)(_binary(_kind))
for _target, _kind in (
    (aten.cos.default, "Cos"),
    (aten.sin.default, "Sin"),
    (aten.log.default, "Log"),
    (aten.floor.default, "Floor"),
    (aten.tanh.default, "Tanh"),
    (aten.sigmoid.default, "Sigmoid"),
    (aten.relu.default, "Relu"),
):
    SHARED.lowers(_target)(_unary(_kind))


@SHARED.lowers(aten.to.dtype, aten._to_copy.default, aten.type_as.default)
def _cast(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("Cast", emitter.value(node.args[0]), to=ELEMENT_TYPES[node.meta["val"].dtype]))


@SHARED.lowers(aten.arange.default)
def _arange(emitter: Emitter, node: Node) -> str:
    count = emitter.op("Squeeze", emitter.size(node.meta["val"].shape[0]))
    zero, one = (emitter.constant(np.array(value)) for value in (0, 1))
    return str(emitter.op("Range", zero, count, one))


@SHARED.lowers(aten.sym_size.int)
def _size(emitter: Emitter, node: Node) -> None:
    """Sizes are read from the shapes that hold them, where they are needed."""


@SHARED.lowers(aten.unsqueeze.default)
def _unsqueeze(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("Unsqueeze", emitter.value(node.args[0]), emitter.constant(np.array([node.args[1]]))))


@SHARED.lowers(aten.transpose.int)
def _transpose(emitter: Emitter, node: Node) -> str:
    order = list(range(node.meta["val"].dim()))
    first, second = node.args[1:3]
    order[first], order[second] = order[second], order[first]
    return str(emitter.op("Transpose", emitter.value(node.args[0]), perm=order))


@SHARED.lowers(aten.view.default, aten.reshape.default, aten.flatten.using_ints)
def _reshape(emitter: Emitter, node: Node) -> str | None:
    source, shape = node.args[0], node.meta["val"].shape
    if source in emitter.flat and len(shape) == 3:
        return emitter.flat[source]
    if len(shape) == 4 and all(is_call(user, ops.ATTEND, ops.WRITE_CACHE) for user in node.users):
        emitter.flattened(node)
        return None
    old = source.meta["val"].shape
    sizes = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            sizes.append(size)
        elif axis < len(old) and str(old[axis]) == str(size):
            sizes.append(0)
        else:
            sizes.append(-1)
    if sizes.count(-1) > 1:
        parts = [emitter.size(size) for size in shape]
        return str(emitter.op("Reshape", emitter.value(source), emitter.op("Concat", *parts, axis=0)))
    return str(emitter.op("Reshape", emitter.value(source), emitter.constant(np.array(sizes))))


@SHARED.lowers(aten.split_with_sizes.default)
def _split(emitter: Emitter, node: Node) -> list[str]:
    source, sizes, axis = node.args
    names = emitter.op("Split", emitter.value(source), emitter.constant(np.array(sizes)), outputs=len(sizes), axis=axis)
    return list(names)


@SHARED.lowers(aten.index_select.default)
def _index_select(emitter: Emitter, node: Node) -> str:
    source, axis, index = node.args
    return str(emitter.op("Gather", emitter.value(source), emitter.value(index), axis=axis))


@SHARED.lowers(aten.index.Tensor)
def _index(emitter: Emitter, node: Node) -> str:
    vector, (index,) = node.args
    return str(emitter.op("Gather", emitter.value(vector), emitter.value(index)))


@SHARED.lowers(aten.topk.default)
def _topk(emitter: Emitter, node: Node) -> list[str]:
    x, count, *axis = node.args
    kept = emitter.constant(np.array([count]))
    return list(emitter.op("TopK", emitter.value(x), kept, outputs=2, axis=axis[0] if axis else -1))


@SHARED.lowers(aten.softmax.int)
def _softmax(emitter: Emitter, node: Node) -> str:
    return str(emitter.op("Softmax", emitter.value(node.args[0]), axis=node.args[1]))


def activate(emitter: Emitter, x: str, activation: str) -> str:
    """An activation of `ops.ACTIVATIONS`."""
    if activation == "silu":
        return str(emitter.op("Mul", x, emitter.op("Sigmoid", x)))
    return str(emitter.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none"))


@SHARED.lowers(aten.gelu.default)
def _gelu(emitter: Emitter, node: Node) -> str:
    approximate = node.kwargs.get("approximate", "none")
    return activate(emitter, emitter.value(node.args[0]), "gelu_tanh" if approximate == "tanh" else "gelu")


@SHARED.lowers(aten.silu.default)
def _silu(emitter: Emitter, node: Node) -> str:
    return activate(emitter, emitter.value(node.args[0]), "silu")


@SHARED.lowers(aten.layer_norm.default)
def _layer_norm(emitter: Emitter, node: Node) -> str:
    """In float32, as torch computes it."""
    x, shape, *rest = node.args
    weight, bias, epsilon = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
    inputs = [
        cast(emitter, emitter.value(value), value.meta["val"].dtype, torch.float32)
        for value in (x, weight, bias)
        if value is not None
    ]
    if weight is None:
        inputs.insert(1, emitter.constant(np.ones(tuple(map(int, shape)), np.float32)))
    normed = emitter.op("LayerNormalization", *inputs, axis=-len(shape), epsilon=epsilon)
    return cast(emitter, normed, torch.float32, node.meta["val"].dtype)


@SHARED.lowers(ops.GATED)
def _gated(emitter: Emitter, node: Node) -> str:
    value = node.meta["val"]
    return gated(emitter, emitter.value(node.args[0]), int(value.shape[-1]), node.args[1], value.dtype)


def gated(emitter: Emitter, packed: str, width: int, activation: str, dtype: torch.dtype) -> str:
    """What becomes of gates and ups [..., 2 * width]; see `ops.experts`."""
    gate, up = emitter.op("Split", packed, emitter.constant(np.array([width, width])), outputs=2, axis=-1)
    if activation != ops.CLAMPED_SWIGLU:
        return str(emitter.op("Mul", activate(emitter, gate, activation), up))
    one, least, most, slope = (
        emitter.number(number, dtype) for number in (1, -ops.SWIGLU_LIMIT, ops.SWIGLU_LIMIT, ops.SWIGLU_SLOPE)
    )
    gate, up = emitter.op("Clip", gate, "", most), emitter.op("Clip", up, least, most)
    activated = emitter.op("Mul", gate, emitter.op("Sigmoid", emitter.op("Mul", gate, slope)))
    return str(emitter.op("Mul", emitter.op("Add", up, one), activated))


@SHARED.lowers(ops.ROTARY)
def _rotary(emitter: Emitter, node: Node) -> str | None:
    x, cos, sin, heads_first, *pairs = node.args
    tables = [_rotation_table(emitter, table, x.meta["val"].shape[0]) for table in (cos, sin)]
    narrow, wide = x.meta["val"].dtype, cos.meta["val"].dtype
    interleaved = int(any(pairs))
    if heads_first:
        value = cast(emitter, emitter.value(x), narrow, wide)
        return cast(emitter, emitter.op("RotaryEmbedding", value, *tables, interleaved=interleaved), wide, narrow)
    heads = int(x.meta["val"].shape[2])
    value = cast(emitter, emitter.flattened(x), narrow, wide)
    rotated = emitter.op("RotaryEmbedding", value, *tables, num_heads=heads, interleaved=interleaved)
    emitter.flat[node] = cast(emitter, rotated, wide, narrow)
    return None


def cast(emitter: Emitter, value: str, dtype: torch.dtype, to: torch.dtype) -> str:
    """A value of one dtype in another."""
    return value if dtype == to else str(emitter.op("Cast", value, to=ELEMENT_TYPES[to]))


@SHARED.lowers(ops.ROUND_ACTIVATIONS)
def _round_activations(emitter: Emitter, node: Node) -> str:
    x, scale, _ = node.args
    grid = (emitter.constant(np.array(scale, np.float32)), emitter.float8_zero())
    return str(emitter.op("DequantizeLinear", emitter.op("QuantizeLinear", emitter.value(x), *grid), *grid))


def _rotation_table(emitter: Emitter, table: Node, batch: Any) -> str:
    """Cosines or sines [T, H / 2] as [B, T, H / 2]."""

    def make() -> str:
        shape = emitter.op("Concat", emitter.size(batch), emitter.constant(np.array([1, 1])), axis=0)
        return str(emitter.op("Expand", emitter.value(table), shape))

    return str(emitter.once(("rotation", table), make))


def new_positions(emitter: Emitter, tokens: Any, first: str) -> str:
    """Positions of the new tokens, int64 [T], of which the first one's is given."""

    def make() -> str:
        count = emitter.op("Squeeze", emitter.size(tokens))
        steps = emitter.op("Range", emitter.constant(np.array(0)), count, emitter.constant(np.array(1)))
        return str(emitter.op("Add", first, steps))

    return str(emitter.once(("positions", str(tokens), first), make))


def start(emitter: Emitter) -> str:
    """Position of the first new token, an int64 scalar."""
    position = emitter.graph.inputs.get("start")
    return emitter.constant(np.array(0)) if position is None else emitter.value(position)


INT32 = TensorProto.INT32
