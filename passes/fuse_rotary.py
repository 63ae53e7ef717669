"""FuseRotary: the rotation of pairs becomes one `transom.rotary`.

Precondition: `Canonicalize` has run.
Rewrite: `low * cos - high * sin` and `high * cos + low * sin` of [B, N, T, H], with cosines [T, H / 2]: the halves of
    every head, joined by `cat`, or its neighbours, joined by `stack`.
Skips: partial rotation, cosines of the full width, and results of another dtype than the input's.
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
        for node in graph.calls(aten.cat.default, aten.stack.default):
            operands, joined = _match(node), node
            if operands is None:
                continue
            interleaved = is_call(node, aten.stack.default)
            if interleaved:
                flat = _flattened(node)
                if flat is None:
                    continue
                joined = flat
            rotated = cast_back(joined, operands[0])
            if rotated.meta["val"].dtype != operands[0].meta["val"].dtype:
                skipped.append(f"{layer_path(node)}: the rotation changes {operands[0]}'s dtype")
                continue
            with graph.fx.inserting_before(joined):
                fused = graph.call(ops.ROTARY, (*operands, True, interleaved), node)
            rotated.replace_all_uses_with(fused)
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))


def _match(node: Node) -> tuple[Node, Node, Node] | None:
    """What is rotated, its cosines and its sines."""
    halves, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    axes = 4 if is_call(node, aten.cat.default) else 5
    if len(halves) != 2 or node.meta["val"].dim() != axes or axis not in (-1, axes - 1):
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
    if (low.args[1], high.args[1]) != (0, 1):
        return None
    x = (_halved if axes == 4 else _paired)(low.args[0])
    # The fused operation does not broadcast angles.
    angles = [str(size) for size in low.meta["val"].shape[2:]]
    if x is None or any([str(size) for size in table.meta["val"].shape] != angles for table in (cos, sin)):
        return None
    return x, cos, sin


def _halved(split: Node) -> Node | None:
    """What is split into both halves of its last axis, and nothing but them."""
    if not is_call(split, aten.split_with_sizes.default) or len(split.args[1]) != 2:
        return None
    axis = split.args[2] if len(split.args) > 2 else 0
    source: Node = split.args[0]
    return source if axis in (-1, 3) and split.args[1][0] == split.args[1][1] else None


def _paired(split: Node) -> Node | None:
    """What is split into the first and the second of all neighbours of its last axis."""
    if not is_call(split, aten.unbind.int) or len(split.args) < 2 or split.args[1] not in (-1, 4):
        return None
    pairs = split.args[0]
    if not is_call(pairs, aten.view.default, aten.reshape.default):
        return None
    source: Node = pairs.args[0]
    outer = [[str(size) for size in value.meta["val"].shape[:3]] for value in (source, pairs)]
    return source if source.meta["val"].dim() == 4 and outer[0] == outer[1] else None


def _flattened(stack: Node) -> Node | None:
    """What reads the pairs as one axis, if nothing else reads them."""
    users = list(stack.users)
    if len(users) != 1 or not is_call(users[0], aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        return None
    pairs, flat = stack.meta["val"].shape, users[0].meta["val"].shape
    same = [str(size) for size in flat] == [*(str(size) for size in pairs[:3]), str(pairs[3] * pairs[4])]
    return users[0] if same else None


def _product(node: Any) -> tuple[Node, Node] | None:
    """(part of a head, cosine or sine) of a product."""
    return (node.args[0], node.args[1]) if is_call(node, aten.mul.Tensor) else None
