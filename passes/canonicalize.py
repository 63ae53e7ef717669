"""Canonicalize: one spelling for each idea.

Precondition: none.
Rewrite: drops assertions, changes of dtype that change nothing, copies and aliases that a graph of values does not
need; turns `_unsafe_view` into `reshape`, `chunk` and `split` into `split_with_sizes`.
Skips: nothing; what it does not know stays.
"""

from __future__ import annotations

from typing import Any

from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite

_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout, aten.to.device)
_COPIES = (
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
)


class Canonicalize(Pass):
    """One spelling for each idea."""

    def rewrite(self, graph: Graph) -> Rewrite:
        """Simplify every call that has a simpler spelling."""
        return Rewrite(changes=sum(_simplify(graph, node) for node in graph.calls_all()))


def _simplify(graph: Graph, node: Node) -> bool:
    if is_call(node, aten._assert_tensor_metadata.default):
        graph.fx.erase_node(node)
        return True
    if _is_noop(node):
        node.replace_all_uses_with(node.args[0])
        graph.fx.erase_node(node)
        return True
    if is_call(node, aten.chunk.default):
        pieces = node.meta["val"]
        axis = node.args[2] if len(node.args) > 2 else 0
        return _replace(
            graph, node, aten.split_with_sizes.default, (node.args[0], [p.shape[axis] for p in pieces], axis)
        )
    if is_call(node, aten.split.Tensor):
        axis = node.args[2] if len(node.args) > 2 else 0
        sizes = [p.shape[axis] for p in node.meta["val"]]
        if all(isinstance(size, int) for size in sizes):
            return _replace(graph, node, aten.split_with_sizes.default, (node.args[0], sizes, axis))
    if is_call(node, aten._unsafe_view.default):
        return _replace(graph, node, aten.reshape.default, node.args)
    return False


def _is_noop(node: Node) -> bool:
    if is_call(node, *_CASTS):
        old, new = node.args[0].meta["val"], node.meta["val"]
        return bool(old.dtype == new.dtype and old.device == new.device)
    if is_call(node, aten.dropout.default):
        return node.args[2] is False or node.args[1] == 0
    return is_call(node, *_COPIES)


def _replace(graph: Graph, node: Node, target: Any, args: Any) -> bool:
    with graph.fx.inserting_before(node):
        new = graph.call(target, args, node)
    node.replace_all_uses_with(new)
    graph.fx.erase_node(node)
    return True
