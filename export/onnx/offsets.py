"""Offsets of quantised blocks: added to the products and rows of their codes, as no operator of ONNX takes them.

Every column of a block has the block's offset, so a product needs the sums of its input's blocks only: a second, narrow
product. ONNX Runtime's MatMulNBits takes fractional zero points, but with them it is fifty times slower for one token.
"""

from __future__ import annotations

import numpy as np

from transom.export.onnx.emitter import Emitter
from transom.graphs.node import Node


def is_offsets(zeros: Node | None) -> bool:
    """Whether what stands in the place of zero points is offsets."""
    return zeros is not None and bool(zeros.meta["val"].is_floating_point())


def add_to_product(emitter: Emitter, product: str, x: Node, codes: Node, zeros: Node | None) -> str:
    """A product with the codes [R, G, bytes], and what their offsets add to it; as it is if there are none."""
    if not is_offsets(zeros):
        return product
    named_weight = emitter.graph.weight_of(zeros)
    assert named_weight is not None, f"{zeros} is no weight"
    name, weight = named_weight
    blocks, columns = weight.shape[1], int(x.meta["val"].shape[-1])

    def make() -> str:
        shape = [0] * (x.meta["val"].dim() - 1) + [blocks, columns // blocks]
        split = emitter.op("Reshape", emitter.value(x), emitter.constant(np.array(shape)))
        return str(emitter.op("ReduceSum", split, emitter.constant(np.array([-1])), keepdims=0))

    sums = emitter.once(("block_sums", x, blocks), make)
    offsets = emitter.initializer(f"{name}.transposed", weight, transposed=True)
    return str(emitter.op("Add", product, emitter.op("MatMul", sums, offsets)))


def add_to_rows(emitter: Emitter, rows: str, tokens: Node, zeros: Node | None) -> str:
    """Rows [..., G, block] of the codes, and their offsets; as they are if there are none."""
    if not is_offsets(zeros):
        return rows
    offsets = emitter.op("Gather", emitter.value(zeros), emitter.value(tokens), axis=0)
    return str(emitter.op("Add", rows, emitter.op("Unsqueeze", offsets, emitter.constant(np.array([-1])))))
