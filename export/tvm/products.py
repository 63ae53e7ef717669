"""Lowering of products with weights, of rows of a table, and of experts."""

from __future__ import annotations

from typing import Any

from tvm import relax

from transom.export.lowering import Table
from transom.export.tvm.emitter import Emitter
from transom.export.tvm.kernels import experts, linear, quantized, rows
from transom.formats.quantized import block_of
from transom.graphs import ops
from transom.graphs.match import aten
from transom.graphs.node import Node

PRODUCTS = Table()


@PRODUCTS.lowers(aten.embedding.default)
def _embedding(emitter: Emitter, node: Node) -> Any:
    return _select(emitter, node, emitter.value(node.args[0]), emitter.value(node.args[1]))


@PRODUCTS.lowers(aten.index.Tensor)
def _index(emitter: Emitter, node: Node) -> Any:
    """A number of a vector for each number of a row."""
    vector, indices = node.args
    if len(indices) != 1 or vector.meta["val"].dim() != 1 or not emitter.is_batched(indices[0]):
        raise emitter.refuse(node, "only numbers of a vector can be chosen by those of rows")
    return emitter.builder.emit(relax.op.take(emitter.value(vector), emitter.value(indices[0]), axis=0, mode="clip"))


@PRODUCTS.lowers(aten.index_select.default)
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


@PRODUCTS.lowers(aten.linear.default)
def _linear(emitter: Emitter, node: Node) -> Any:
    x, weight, *bias = node.args
    n, k = (int(size) for size in weight.meta["val"].shape)
    product = _product(emitter, node, x, emitter.value(weight), n, k)
    if not bias or bias[0] is None:
        return product
    return emitter.builder.emit(relax.op.add(product, emitter.value(bias[0])))


@PRODUCTS.lowers(aten.matmul.default)
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


@PRODUCTS.lowers(ops.LINEAR_QUANTIZED)
def _linear_quantized(emitter: Emitter, node: Node) -> Any:
    if emitter.is_single(node):
        return _with_codes(emitter, node, "linear_codes_row", quantized.vector_product)
    return _with_codes(emitter, node, "linear_codes_rows", quantized.matrix_product)


@PRODUCTS.lowers(ops.EMBEDDING_QUANTIZED)
def _embedding_quantized(emitter: Emitter, node: Node) -> Any:
    return _with_codes(emitter, node, "embedding_codes", lambda layout, tile: quantized.table_rows(layout))


@PRODUCTS.lowers(aten.topk.default)
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


@PRODUCTS.lowers(ops.EXPERTS)
def _experts(emitter: Emitter, node: Node) -> Any:
    _, _, _, gate_up, down, *biases, activation = node.args

    def product(matrix: Node, bias: Node | None, count: int, repeat: int, x: Any, chosen: Any) -> Any:
        rows_of_all, k = (int(size) for size in matrix.meta["val"].shape)
        n, weight = rows_of_all // count, emitter.value(matrix)
        inputs = (x, chosen, weight, weight if bias is None else emitter.value(bias))
        key = ("chosen_rows", n, k, count, repeat, bias is not None)
        return key, n, lambda: experts.chosen_product(n, k, count, repeat, bias is not None, emitter.tile), inputs

    return _mixture(emitter, node, product, (gate_up, down), biases, activation)


@PRODUCTS.lowers(ops.EXPERTS_QUANTIZED)
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
