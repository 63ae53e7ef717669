"""FuseGatedMLP: gate and up projection become one linear, followed by `transom.gated`.

Precondition: `Canonicalize` has run, and `ConvertQuantized` if it is in the list.
Rewrite: `activation(linear(x, gate)) * linear(x, up)` with matrices of one shape and no biases, for the activations of
`graphs.ops.ACTIVATIONS`; of quantised linears the codes are stacked.
Skips: other activations, projections of different inputs, and codes that no format holds together, which are reported.
"""

from __future__ import annotations

from typing import Any

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.linears import matrix_of, stack


class FuseGatedMLP(Pass):
    """One projection for gate and up."""

    after = (Canonicalize, ConvertQuantized)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Fuse every gated MLP."""
        changes, skipped = 0, list[str]()
        for node in graph.calls(aten.mul.Tensor):
            for activated, up in (node.args[:2], node.args[1::-1]):
                activation = activation_of(activated)
                if activation is not None and _fuse(graph, node, activated.args[0], up, activation, skipped):
                    changes += 1
                    break
        return Rewrite(changes=changes, skipped=tuple(skipped))


def _fuse(graph: Graph, node: Node, gate: Any, up: Any, activation: str, skipped: list[str]) -> bool:
    named_gate, named_up = (matrix_of(graph, linear) for linear in (gate, up))
    if named_gate is None or named_up is None or gate.target is not up.target or gate.args[0] is not up.args[0]:
        return False
    if gate.meta["val"].shape[-1] != up.meta["val"].shape[-1]:
        return False
    name = named_gate[0]
    joint = name.replace("gate_proj", "gate_up_proj") if "gate_proj" in name else f"{name}.gate_up"
    linear = stack(graph, [gate, up], joint)
    if linear is None:
        skipped.append(f"{name}, {named_up[0]}: no format holds the codes of both")
        return False
    with graph.fx.inserting_before(node):
        node.replace_all_uses_with(graph.call(ops.GATED, (linear, activation), node))
    return True


def activation_of(node: Any) -> str | None:
    """Name of the activation that a node computes, if it is one."""
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return "silu" if is_call(node, aten.silu.default) else None
