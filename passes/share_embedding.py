"""ShareEmbedding: an embedding and a head with the same numbers read one buffer.

Precondition: none.
Rewrite: weight inputs whose recipes are the same object become one input.
Skips: weights that are equal only by value; comparing 27B numbers is the checkpoint reader's affair.
"""

from __future__ import annotations

from transom.graphs.graph import Graph
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite


class ShareEmbedding(Pass):
    """One buffer for tied weights."""

    def rewrite(self, graph: Graph) -> Rewrite:
        """Merge weights that have the same recipe."""
        first: dict[int, Node] = {}
        nodes, changes = graph.placeholders(), 0
        for placeholder, name in graph.weight_names().items():
            node = nodes[placeholder]
            kept = first.setdefault(id(graph.weights[name]), node)
            if kept is not node and node.users:
                node.replace_all_uses_with(kept)
                changes += 1
        return Rewrite(changes=changes)
