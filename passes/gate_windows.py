"""GateWindows: every layer's attention sees a mixture of windows, whose shares can be trained.

Precondition: `FuseAttention` has run on a graph without caches; no site has sinks or a soft cap.
Rewrite: `transom.attention` becomes `transom.gated_attention` over the windows that are on offer, whatever window it
had; a layer's gates are a new weight of the graph, layers.N.window_gates, zeros: equal shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transom.errors import InvariantError
from transom.graphs import ops
from transom.graphs.gated_windows import GATED_ATTENTION
from transom.graphs.graph import Graph
from transom.graphs.match import layer_path
from transom.graphs.weight import Weight
from transom.passes.base import Pass, Rewrite
from transom.passes.fuse_attention import FuseAttention

GATES = "window_gates"
"""Last part of the name of a layer's gates."""


class GateWindows(Pass):
    """Attention over a mixture of windows.

    Args:
        windows: On offer, in keys; 0 for every earlier one.
    """

    after = (FuseAttention,)

    def __init__(self, windows: Sequence[int]) -> None:
        self.windows = tuple(windows)

    def requires(self, graph: Graph) -> None:
        """Raise `InvariantError` if attention reads caches, is not recognised, or has sinks or a cap."""
        sites = graph.calls(ops.ATTENTION)
        if graph.states or not sites:
            raise InvariantError("windows are gated in a graph without caches whose attention was recognised")
        if any(any(node.args[4:]) or node.kwargs.get("softcap") for node in sites):
            raise InvariantError("windows are gated of attention without images, sinks or soft caps")

    def rewrite(self, graph: Graph) -> Rewrite:
        """Replace every site."""
        sites = graph.calls(ops.ATTENTION)
        for node in sites:
            layer = ".".join(layer_path(node).split(".")[:2])
            gates = graph.add_weight(f"{layer}.{GATES}", Weight.of(torch.zeros(len(self.windows)), "gates"))
            options = {"scale": node.kwargs["scale"], "windows": list(self.windows)}
            with graph.fx.inserting_before(node):
                gated = graph.call(GATED_ATTENTION, (*node.args[:3], gates), node, options)
            node.replace_all_uses_with(gated)
            graph.fx.erase_node(node)
        return Rewrite(changes=len(sites))
