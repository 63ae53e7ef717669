"""FuseNorms: the textbook RMSNorm becomes one `transom.rms_norm`, its `1 + w` folded into the weight.

Precondition: `Canonicalize` has run.
Rewrite: `x * rsqrt(mean(x ** 2) + eps)` over the last axis, times a weight or `1 + weight`; without either, times a
weight of ones.
Skips: norms over other axes; a scale that is no weight stays behind the norm.
"""

from __future__ import annotations

from typing import Any

import torch

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, cast_back, is_call, skip_casts, split_scalar
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize


class FuseNorms(Pass):
    """RMSNorm as one operation."""

    after = (Canonicalize,)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Fuse every RMSNorm, with the product with a weight that it ends in, if there is one."""
        changes = 0
        for node in graph.calls(aten.mul.Tensor):
            for normed, scale in (node.args[:2], node.args[1::-1]):
                operands = _match_normalised(skip_casts(normed))
                weight = _weight(graph, scale, operands[0].meta["val"].shape[-1]) if operands else None
                if operands is None or weight is None:
                    continue
                _fuse(graph, node, *operands, weight)
                changes += 1
                break
        if changes:
            # Norms that were fused are none without a weight.
            graph.drop_dead_code()
        for node in graph.calls(aten.mul.Tensor):
            if (operands := _match_normalised(node)) is not None:
                width = node.meta["val"].shape[-1]
                _fuse(graph, node, *operands, graph.add_weight(f"ones.{width}", Weight.of(torch.ones(width), "ones")))
                changes += 1
        return Rewrite(changes=changes)


def _fuse(graph: Graph, node: Node, x: Node, eps: float, weight: Node) -> None:
    """Put one operation in the place of a norm that ends in a node, and of the cast behind it."""
    normalised = cast_back(node, x)
    with graph.fx.inserting_before(node):
        if normalised.meta["val"].dtype != x.meta["val"].dtype:  # its result stays wider than its input
            x = graph.call(aten.to.dtype, (x, normalised.meta["val"].dtype), node)
        fused = graph.call(ops.RMS_NORM, (x, weight, eps), node)
    normalised.replace_all_uses_with(fused)


def _match_normalised(node: Any) -> tuple[Node, float] | None:
    """(x, eps) of `x * rsqrt(mean(x ** 2, -1) + eps)`."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for x, inverse in (node.args[:2], node.args[1::-1]):
        if not is_call(inverse, aten.rsqrt.default):
            continue
        shifted = split_scalar(inverse.args[0], aten.add.Tensor)
        if shifted is None or not is_call(shifted[0], aten.mean.dim):
            continue
        mean, eps = shifted
        square, axes = mean.args[0], list(mean.args[1])
        if axes not in ([-1], [x.meta["val"].dim() - 1]) or not is_call(square, aten.pow.Tensor_Scalar):
            continue
        if square.args == (x, 2):
            return skip_casts(x), eps
    return None


def _weight(graph: Graph, scale: Any, width: Any) -> Node | None:
    """The norm's weight [width] as one input; `1 + w` becomes a weight of its own."""
    scale = skip_casts(scale)
    shifted = split_scalar(scale, aten.add.Tensor)
    named_weight = graph.weight_of(skip_casts(shifted[0] if shifted else scale))
    if named_weight is None or named_weight[1].shape != (width,):
        return None
    name, weight = named_weight
    if shifted is None:
        return graph.placeholders()[{v: k for k, v in graph.weight_names().items()}[name]]
    offset = shifted[1]
    # Float32, whatever the checkpoint's dtype: 1 + w has too few bits in bfloat16.
    folded = weight.to(torch.float32).map_rows(lambda rows: rows + offset)
    return graph.add_weight(f"{name}.plus_{offset:g}", folded)
