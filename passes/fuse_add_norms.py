"""FuseAddNorms: a residual add and the norm that follows it become one `transom.add_rms_norm`.

Precondition: `FuseNorms` has run, and `SelectLogits` if it is in the list.
Rewrite: `rms_norm(x + y)`; the sum stays available to its other users.
Skips: adds of a number, and adds that broadcast.
"""

from __future__ import annotations

import operator

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import is_node
from transom.passes.base import Pass, Rewrite
from transom.passes.fuse_norms import FuseNorms
from transom.passes.select_logits import SelectLogits


class FuseAddNorms(Pass):
    """Residual add and norm in one."""

    after = (FuseNorms, SelectLogits)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Fuse every norm of a residual sum."""
        changes = 0
        for node in graph.calls(ops.RMS_NORM):
            total, weight, eps = node.args
            if not is_call(total, aten.add.Tensor) or not all(is_node(side) for side in total.args[:2]):
                continue
            left, right = total.args[:2]
            if str(left.meta["val"].shape) != str(right.meta["val"].shape) or total.kwargs:
                continue
            with graph.fx.inserting_before(total):
                fused = graph.call(ops.ADD_RMS_NORM, (right, left, weight, eps), node)
                normed, summed = (graph.call(operator.getitem, (fused, index), node) for index in range(2))
            node.replace_all_uses_with(normed)
            total.replace_all_uses_with(summed)
            changes += 1
        return Rewrite(changes=changes)
