"""PackProjections: query, key and value projections of one input become one linear and a split.

Precondition: `Canonicalize` has run, and `FuseGatedMLP` if it is in the list.
Rewrite: two or more bias-free linears that read the same value, in the order in which they are traced.
Skips: linears with a bias, and weights that are shared with another use (a tied head).
"""

from __future__ import annotations

import operator
from collections import defaultdict

from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import Pass
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_gated_mlp import FuseGatedMLP


class PackProjections(Pass):
    """One linear for projections of the same input."""

    after = (Canonicalize, FuseGatedMLP)

    def rewrite(self, graph: Graph) -> int:
        """Pack every group of projections."""
        groups: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.calls(aten.linear.default):
            if len(node.args) == 2 and graph.weight_of(node.args[1]) and len(node.args[1].users) == 1:
                groups[node.args[0]].append(node)
        packs = [group for group in groups.values() if len(group) > 1]
        for group in packs:
            _pack(graph, group)
        return len(packs)


def _pack(graph: Graph, group: list[Node]) -> None:
    named_weights = [graph.weight_of(node.args[1]) for node in group]
    names, weights = [item[0] for item in named_weights if item], [item[1] for item in named_weights if item]
    name = names[0].replace("q_proj", "qkv_proj") if "q_proj" in names[0] else names[0] + ".packed"
    packed = graph.add_weight(name, Weight.concat(weights))
    first = group[0]
    with graph.fx.inserting_before(first):
        linear = graph.call(aten.linear.default, (first.args[0], packed), first)
        split = graph.call(aten.split_with_sizes.default, (linear, [weight.shape[0] for weight in weights], -1), first)
        pieces = [graph.call(operator.getitem, (split, index), old) for index, old in enumerate(group)]
    for old, new in zip(group, pieces, strict=True):
        old.replace_all_uses_with(new)
