"""QuantizeActivations: what goes into quantised linears is rounded to 8-bit floats, with one scale a tensor.

Precondition: `ConvertQuantized` has run. What the linears read is measured on the graph as it is then.
Rewrite: the input of every `transom.linear_quantized` with a scale goes through `transom.round_activations`; linears
that read one value share it.
Skips: the head, whose weight the embedding reads too; linears whose input was not observed, or was always zero, which
are reported.
"""

from __future__ import annotations

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.node import Node
from transom.passes.base import Measurement, Pass, Rewrite
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.insert_observers import input_name


class QuantizeActivations(Pass):
    """Rounded inputs of linears.

    Args:
        measure: Returns the scale by name of the site, such as "layers.3.mlp.down_proj.input".
        format: What they are rounded to.
    """

    after = (ConvertQuantized,)

    def __init__(self, measure: Measurement, format: str = "float8_e4m3fn") -> None:
        self.measure, self.format = measure, format

    def rewrite(self, graph: Graph) -> Rewrite:
        """Round the input of every linear that has a scale."""
        scales = self.measure(graph)
        tables = {node.args[1] for node in graph.calls(ops.EMBEDDING_QUANTIZED)}
        rounded: dict[tuple[Node, float], Node] = {}
        changes, skipped = 0, list[str]()
        for node in graph.calls(ops.LINEAR_QUANTIZED):
            x, codes = node.args[:2]
            named_codes = graph.weight_of(codes)
            if codes in tables or named_codes is None or x.target is ops.ROUND_ACTIVATIONS:
                continue
            name = input_name(named_codes[0])
            if not scales.get(name):
                skipped.append(f"{name}: no numbers of it were observed")
                continue
            key = (x, scales[name])
            if key not in rounded:
                with graph.fx.inserting_before(node):
                    rounded[key] = graph.call(ops.ROUND_ACTIVATIONS, (x, scales[name], self.format), node)
            node.update_arg(0, rounded[key])
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))
