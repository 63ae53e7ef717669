"""The `onnx` dialect: standard operators of opset 24 and nothing else, for any runtime that has them.

Local caches are rings; see `rings`.
"""

from __future__ import annotations

import functools

import numpy as np

from transom.errors import QuantizationError
from transom.export.lowering import Table
from transom.export.onnx import experts
from transom.export.onnx.blocked import Blocked
from transom.export.onnx.dialect import Dialect
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.floats import FLOATS, looked_up
from transom.export.onnx.lowerings import add_bias
from transom.export.onnx.offsets import add_to_product, add_to_rows, is_offsets
from transom.export.onnx.rings import OPSET, RINGS, write_cache
from transom.graphs import ops
from transom.graphs.match import aten
from transom.graphs.node import Node

TABLE = Table(RINGS)
TABLE.lowers(ops.WRITE_CACHE)(write_cache)
TABLE.lowers(ops.EXPERTS)(experts.lower)
TABLE.lowers(ops.EXPERTS_QUANTIZED)(experts.lower_quantized)


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
    x, codes, scales, zeros, format = node.args
    if format in FLOATS:
        table = emitter.op("Transpose", looked_up(emitter, codes, scales, format), perm=[1, 0])
        return str(emitter.op("MatMul", emitter.value(x), table))
    matrix = Blocked(emitter, node.args[1:])
    weight = emitter.op("DequantizeLinear", *matrix.inputs(), axis=0, block_size=matrix.block)
    product = emitter.op("MatMul", emitter.value(x), weight)
    return add_to_product(emitter, product, x, codes, zeros)


@TABLE.lowers(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(emitter: Emitter, node: Node) -> str:
    """Columns of the head's matrix [K, V], so that both read one buffer."""
    tokens, codes, scales, zeros, format = node.args
    if format in FLOATS:
        return looked_up(emitter, codes, scales, format, rows=tokens)
    matrix = Blocked(emitter, node.args[1:])
    if matrix.bits < 8:
        raise QuantizationError("standard ONNX cannot look up rows of 4-bit codes: choose a scheme with an 8-bit table")
    columns = [emitter.op("Gather", name, emitter.value(tokens), axis=1) for name in matrix.inputs()]
    numbers = emitter.op("DequantizeLinear", *columns, axis=0, block_size=matrix.block)
    rows = emitter.op("Transpose", numbers, perm=[1, 2, 0])
    if not is_offsets(zeros):
        return str(rows)
    split = emitter.op("Reshape", rows, emitter.constant(np.array([0, 0, matrix.blocks, matrix.block])))
    rows = add_to_rows(emitter, split, tokens, zeros)
    return str(emitter.op("Reshape", rows, emitter.constant(np.array([0, 0, matrix.blocks * matrix.block]))))


DIALECT = Dialect(name="onnx", opset=OPSET, ir_version=11, domains={}, lowerings=TABLE)
