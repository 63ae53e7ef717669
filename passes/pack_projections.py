"""PackProjections: query, key and value projections of one input become one linear and a split.

Precondition: `Canonicalize` has run, and `ConvertQuantized` and `FuseGatedMLP` if they are in the list.
Rewrite: two or more linears that read the same value, in the order in which they are traced; of quantised ones the
codes are stacked.
Skips: linears with a bias, unless they are quantised, as then it is added afterwards; matrices that are shared with
another use (a tied head); codes that no format holds together, which are reported.
"""

from __future__ import annotations

from collections import defaultdict

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.linears import matrix_of, split, stack


class PackProjections(Pass):
    """One linear for projections of the same input."""

    after = (Canonicalize, ConvertQuantized, FuseGatedMLP)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Pack every group of projections."""
        groups: dict[tuple[Node, object], list[Node]] = defaultdict(list)
        for node in graph.calls(aten.linear.default, ops.LINEAR_QUANTIZED):
            if matrix_of(graph, node) and len(node.args[1].users) == 1:
                groups[node.args[0], node.target].append(node)
        changes, skipped = 0, list[str]()
        for group in groups.values():
            names = [named[0] for node in group if (named := matrix_of(graph, node))]
            if len(group) < 2:
                continue
            name = names[0].replace("q_proj", "qkv_proj") if "q_proj" in names[0] else f"{names[0]}.packed"
            linear = stack(graph, group, name)
            if linear is None:
                skipped.append(f"{', '.join(names)}: no format holds the codes of all")
                continue
            split(graph, linear, group)
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))
