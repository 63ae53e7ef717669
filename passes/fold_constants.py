"""FoldConstants: whatever depends on no input is computed once, here.

Precondition: none.
Rewrite: calls without any input, of a static shape, become weights. This also keeps a runtime's own `pow` out of
rotary frequencies, where an ulp grows with the position.
Skips: random numbers, symbolic sizes, results of more than 1 MiB.
"""

from __future__ import annotations

import torch

from transom.graphs.graph import Graph, run_nodes
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import Pass, Rewrite

LIMIT_BYTES = 2**20


class FoldConstants(Pass):
    """Compute what no input changes."""

    def rewrite(self, graph: Graph) -> Rewrite:
        """Replace every constant that something else depends on."""
        # In the order of the graph, so that every run names and writes weights in one order.
        constant: dict[Node, None] = {}
        for node in graph.calls_all():
            value = node.meta["val"]
            if all(used in constant for used in node.all_input_nodes) and _is_static(node, value):
                constant[node] = None
        roots = [node for node in constant if any(user not in constant for user in node.users)]
        values = run_nodes(roots, {})
        for node in roots:
            name = f"constant.{node.name}"
            node.replace_all_uses_with(graph.add_weight(name, Weight.of(values[node].contiguous(), "folded constant")))
        return Rewrite(changes=len(roots))


def _is_static(node: Node, value: object) -> bool:
    if not isinstance(value, torch.Tensor) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    if not all(isinstance(size, int) for size in value.shape):
        return False
    return value.dim() > 0 and value.numel() * value.element_size() <= LIMIT_BYTES
