"""FuseGatedMLP: gate and up projection become one linear, followed by `transom.gated_gelu`.

Precondition: `Canonicalize` has run.
Rewrite: `gelu_tanh(linear(x, gate)) * linear(x, up)` with weights of one shape and no biases.
Skips: other activations, and projections of different inputs.
"""

from __future__ import annotations

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.weight import Weight
from transom.passes.base import Pass
from transom.passes.canonicalize import Canonicalize


class FuseGatedMLP(Pass):
    """One projection for gate and up."""

    after = (Canonicalize,)

    def rewrite(self, graph: Graph) -> int:
        """Fuse every gated MLP."""
        changes = 0
        for node in graph.calls(aten.mul.Tensor):
            activated, up = node.args[:2]
            if not is_call(activated, aten.gelu.default) or activated.kwargs.get("approximate") != "tanh":
                continue
            gate = activated.args[0]
            if not (is_call(gate, aten.linear.default) and is_call(up, aten.linear.default)):
                continue
            if len(gate.args) != 2 or len(up.args) != 2 or gate.args[0] is not up.args[0]:
                continue
            named_gate, named_up = graph.weight_of(gate.args[1]), graph.weight_of(up.args[1])
            if named_gate is None or named_up is None or named_gate[1].shape != named_up[1].shape:
                continue
            (name, gate_weight), (_, up_weight) = named_gate, named_up
            joint = name.replace("gate_proj", "gate_up_proj") if "gate_proj" in name else f"{name}.gate_up"
            packed = graph.add_weight(joint, Weight.concat([gate_weight, up_weight]))
            with graph.fx.inserting_before(node):
                linear = graph.call(aten.linear.default, (gate.args[0], packed), gate)
                fused = graph.call(ops.GATED_GELU, (linear,), node)
            node.replace_all_uses_with(fused)
            changes += 1
        return changes
