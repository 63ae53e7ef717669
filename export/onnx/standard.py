"""The `onnx` dialect: standard operators of opset 24 and nothing else, for any runtime that has them.

Local caches are rings: TensorScatter writes position p into slot p % S, and Attention masks by the position that each
slot holds. The masks are built once and shared by all layers of a kind.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from transom.errors import QuantizationError
from transom.export.lowering import Table
from transom.export.onnx.blocked import Blocked
from transom.export.onnx.emitter import Dialect, Emitter
from transom.export.onnx.floats import FLOATS, looked_up
from transom.export.onnx.lowerings import SHARED, add_bias, new_positions, start
from transom.graphs import ops
from transom.graphs.match import aten
from transom.graphs.node import Node

TABLE = Table(SHARED)


@TABLE.lowers(ops.RMS_NORM)
def _rms_norm(emitter: Emitter, node: Node) -> str:
    x, weight, eps = node.args
    return str(emitter.op("RMSNormalization", emitter.value(x), emitter.value(weight), axis=-1, epsilon=eps))


@TABLE.lowers(aten.linear.default)
def _linear(emitter: Emitter, node: Node) -> str:
    x, table = node.args[:2]
    named_weight = emitter.graph.weight_of(table)
    if named_weight is None or len(table.users) > 1:
        # A table that an embedding reads too keeps its layout; Gemm reads it transposed, but only with two axes.
        width, rows = int(x.meta["val"].shape[-1]), int(node.meta["val"].shape[-1])
        leading = [emitter.size(size) for size in x.meta["val"].shape[:-1]]
        # Not -1, and zeros mean zero: perhaps no position is wanted.
        count = functools.reduce(lambda left, right: emitter.op("Mul", left, right), leading)
        flat_shape = emitter.op("Concat", count, emitter.size(width), axis=0)
        flat = emitter.op("Reshape", emitter.value(x), flat_shape, allowzero=1)
        product = emitter.op("Gemm", flat, emitter.value(table), transB=1)
        shape = emitter.op("Concat", *leading, emitter.size(rows), axis=0)
        product = emitter.op("Reshape", product, shape, allowzero=1)
    else:
        name, weight = named_weight
        table_name = emitter.initializer(f"{name}.transposed", weight, transposed=True)
        product = emitter.op("MatMul", emitter.value(x), table_name)
    return add_bias(emitter, node, product)


@TABLE.lowers(ops.LINEAR_QUANTIZED)
def _linear_quantized(emitter: Emitter, node: Node) -> str:
    _, codes, scales, _, number = node.args
    if number in FLOATS:
        table = emitter.op("Transpose", looked_up(emitter, codes, scales, number), perm=[1, 0])
        return str(emitter.op("MatMul", emitter.value(node.args[0]), table))
    matrix = Blocked(emitter, node.args[1:])
    weight = emitter.op("DequantizeLinear", *matrix.inputs(), axis=0, block_size=matrix.block)
    return str(emitter.op("MatMul", emitter.value(node.args[0]), weight))


@TABLE.lowers(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(emitter: Emitter, node: Node) -> str:
    """Columns of the head's matrix [K, V], so that both read one buffer."""
    _, codes, scales, _, number = node.args
    if number in FLOATS:
        return looked_up(emitter, codes, scales, number, rows=node.args[0])
    matrix, tokens = Blocked(emitter, node.args[1:]), emitter.value(node.args[0])
    if matrix.bits < 8:
        raise QuantizationError("standard ONNX cannot look up rows of 4-bit codes: choose a scheme with an 8-bit table")
    columns = [emitter.op("Gather", name, tokens, axis=1) for name in matrix.inputs()]
    numbers = emitter.op("DequantizeLinear", *columns, axis=0, block_size=matrix.block)
    return str(emitter.op("Transpose", numbers, perm=[1, 2, 0]))


@TABLE.lowers(ops.WRITE_CACHE)
def _write_cache(emitter: Emitter, node: Node) -> str:
    cache, new, _ = node.args
    batch, _, slots, _ = cache.meta["val"].shape

    def make() -> str:
        slot = emitter.op("Mod", start(emitter), emitter.size(slots))
        return str(emitter.op("Expand", slot, emitter.size(batch)))

    indices = emitter.once(("write_indices", str(slots)), make)
    return str(emitter.op("TensorScatter", emitter.value(cache), emitter.value(new), indices, mode="circular"))


@TABLE.lowers(ops.ATTENTION)
def _attention(emitter: Emitter, node: Node) -> str:
    q, k, v, position, scale, window = node.args
    tokens, slots = q.meta["val"].shape[2], k.meta["val"].shape[2]
    # Over themselves, new tokens are as far from each other wherever they stand.
    first = emitter.constant(np.array(0)) if position is None else start(emitter)
    mask = emitter.once(("mask", str(slots), window, first), lambda: _mask(emitter, tokens, slots, window, first))
    inputs = [emitter.value(value) for value in (q, k, v)]
    return str(emitter.op("Attention", *inputs, mask, scale=scale, is_causal=0))


def _mask(emitter: Emitter, tokens: Any, slots: Any, window: int, first: str) -> str:
    """Which slots each new token sees, bool [T, S]; see `graphs.ops.visible`."""
    zero, one = emitter.constant(np.array(0)), emitter.constant(np.array(1))
    positions = new_positions(emitter, tokens, first)
    last = emitter.op("Sub", emitter.op("Add", first, emitter.size(tokens)), one)
    slot = emitter.op("Range", zero, emitter.op("Squeeze", emitter.size(slots)), one)
    # ONNX's Mod of integers takes the sign of the divisor, as Python's does.
    age = emitter.op("Mod", emitter.op("Sub", last, slot), emitter.size(slots))
    keys = emitter.op("Sub", last, age)
    distance = emitter.op("Sub", emitter.op("Unsqueeze", positions, emitter.constant(np.array([1]))), keys)
    seen = emitter.op("And", emitter.op("GreaterOrEqual", keys, zero), emitter.op("GreaterOrEqual", distance, zero))
    if window:
        near = emitter.op("Less", distance, emitter.constant(np.array(window)))
        seen = emitter.op("And", seen, near)
    return str(seen)


DIALECT = Dialect(name="onnx", opset=24, ir_version=11, domains={}, lowerings=TABLE)
