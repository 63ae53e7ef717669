"""SelectLogits: compute logits only where they are wanted.

Precondition: a `decode` graph; it returns `index_select(logits, 1, logit_positions)`.
Rewrite: moves the selection up through everything that treats each position by itself (head, final norm, residual
adds, and the last layer's MLP), so that a prefill chunk pays for one row of the vocabulary, not for T rows.
Skips: whatever mixes positions (attention) or has other uses stops the selection.
"""

from __future__ import annotations

from typing import Any

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node, is_node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_norms import FuseNorms

# Operations that treat every position by itself, with the arguments that carry positions.
_BY_POSITION: dict[Any, tuple[int, ...]] = {
    aten.linear.default: (0,),
    aten.mul.Tensor: (0, 1),
    aten.add.Tensor: (0, 1),
    aten.div.Tensor: (0, 1),
    aten.tanh.default: (0,),
    aten.gelu.default: (0,),
    aten.silu.default: (0,),
    aten.sigmoid.default: (0,),
    aten.to.dtype: (0,),
    ops.RMS_NORM: (0,),
    ops.GATED: (0,),
}


class SelectLogits(Pass):
    """Move the selection of positions towards the input."""

    after = (Canonicalize, FuseNorms)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Hoist the selection step by step; counts the operations that it passed."""
        changes = 0
        pending = [node for node in graph.calls(aten.index_select.default) if node.args[1] == 1]
        while pending:
            select = pending.pop()
            source = select.args[0]
            if not _movable(source, select):
                continue
            inner: list[Node] = []
            args = list(source.args)
            with graph.fx.inserting_before(source):
                for position in _BY_POSITION[source.target]:
                    operand = args[position]
                    if is_node(operand) and _has_positions(operand, source):
                        chosen = _select(graph, operand, select.args[2])
                        args[position] = chosen
                        inner.append(chosen)
                moved = graph.call(source.target, tuple(args), source, source.kwargs)
            select.replace_all_uses_with(moved)
            graph.fx.erase_node(select)
            graph.fx.erase_node(source)
            pending.extend(node for node in dict.fromkeys(inner) if node not in pending)
            changes += 1
        return Rewrite(changes=changes)


def _movable(source: Any, select: Node) -> bool:
    if not is_call(source, *_BY_POSITION) or source.meta["val"].dim() != 3:
        return False
    # What broadcasts over positions must do so visibly: a matrix [T, D] could be either.
    operands = [source.args[position] for position in _BY_POSITION[source.target]]
    if any(is_node(operand) and operand.meta["val"].dim() == 2 for operand in operands):
        return False
    return all(user is select for user in source.users)


def _has_positions(operand: Node, source: Node) -> bool:
    """Whether an operand has every position of the result, and not one value for all."""
    shape, full = operand.meta["val"].shape, source.meta["val"].shape
    return len(shape) == len(full) and str(shape[1]) == str(full[1])


def _select(graph: Graph, operand: Node, positions: Node) -> Node:
    for user in operand.users:
        if is_call(user, aten.index_select.default) and user.args[1:] == (1, positions):
            return user
    # Beside the operand, so that another of its readers, which may stand further up, can share it.
    with graph.fx.inserting_after(operand):
        return graph.call(aten.index_select.default, (operand, 1, positions), operand)
