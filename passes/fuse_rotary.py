"""FuseRotary: the rotation of half-split pairs becomes one `transom.rotary`.

Precondition: `Canonicalize` has run.
Rewrite: `cat(low * cos - high * sin, high * cos + low * sin)` on the halves of [B, N, T, H], with cosines [T, H / 2].
Skips: interleaved pairs, partial rotation, cosines of the full width, and results of another dtype than the input's.
"""

from __future__ import annotations

import operator
from typing import Any

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, cast_back, is_call, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize


class FuseRotary(Pass):
    """Rotary embedding as one operation."""

    after = (Canonicalize,)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Fuse every rotation."""
        changes, skipped = 0, list[str]()
        for node in graph.calls(aten.cat.default):
            operands = _match(node)
            if operands is None:
                continue
            rotated = cast_back(node, operands[0])
            if rotated.meta["val"].dtype != operands[0].meta["val"].dtype:
                skipped.append(f"{layer_path(node)}: the rotation changes {operands[0]}'s dtype")
                continue
            with graph.fx.inserting_before(node):
                fused = graph.call(ops.ROTARY, (*operands, True), node)
            rotated.replace_all_uses_with(fused)
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))


def _match(node: Node) -> tuple[Node, Node, Node] | None:
    halves, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if len(halves) != 2 or axis not in (-1, 3) or node.meta["val"].dim() != 4:
        return None
    first, second = halves
    if not is_call(first, aten.sub.Tensor) or not is_call(second, aten.add.Tensor):
        return None
    low_cos, high_sin = (_product(side) for side in first.args[:2])
    high_cos, low_sin = (_product(side) for side in second.args[:2])
    if None in (low_cos, high_sin, high_cos, low_sin):
        return None
    (low, cos), (high, sin) = low_cos, high_sin  # type: ignore[misc]
    if high_cos != (high, cos) or low_sin != (low, sin) or cos.meta["val"].dim() != 2:
        return None
    if not (is_call(low, operator.getitem) and is_call(high, operator.getitem)) or low.args[0] is not high.args[0]:
        return None
    split = low.args[0]
    if not is_call(split, aten.split_with_sizes.default) or (low.args[1], high.args[1]) != (0, 1):
        return None
    # Both halves, and nothing but them; the fused operation does not broadcast angles.
    if len(split.args[1]) != 2:
        return None
    angles = [str(size) for size in (split.args[0].meta["val"].shape[2], split.args[1][0])]
    if any([str(size) for size in table.meta["val"].shape] != angles for table in (cos, sin)):
        return None
    return split.args[0], cos, sin


def _product(node: Any) -> tuple[Node, Node] | None:
    """(half of a head, cosine or sine) of a product."""
    return (node.args[0], node.args[1]) if is_call(node, aten.mul.Tensor) else None
