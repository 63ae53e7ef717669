"""InsertObservers: the graph also returns statistics of its numbers, to calibrate by or to trace ranges with.

Precondition: none; it works on a graph as traced and at any later stage. An observer is one more reader of a value, so
passes that fuse what has one reader leave it alone: insert observers where no fusion follows.
Rewrite: a `transom.observe` and a tap of op "range" for each site. With `sites` "linears": what every linear reads,
named after its weight ("range.layers.3.mlp.down_proj.input"). With "values": every floating-point value that is
computed from activations, named by module path and operation ("range.layers.3.add", "range.layers.3.add.2").
Skips: sites that are observed already, so that a second run changes nothing; linears whose weight has no name, and a
second linear of one weight (both reported); with "values", what only rearranges or casts numbers, and what depends on
positions or weights alone.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from typing import Literal

import torch

from transom.graphs import ops
from transom.graphs.graph import Graph, Tap
from transom.graphs.match import CASTS, LAYOUT, aten, is_call, layer_path, skip_casts
from transom.graphs.node import Node
from transom.graphs.observe import OBSERVE
from transom.passes.base import Pass, Rewrite

PREFIX, OP = "range.", "range"

_LINEARS = (aten.linear.default, ops.LINEAR_QUANTIZED)
# Their results hold numbers that are observed elsewhere.
_MOVES = (
    *LAYOUT, *CASTS, aten.index_select.default, aten.index_copy.default, aten.select.int, aten.chunk.default,
    aten.split_with_sizes.default, aten.masked_fill.Scalar, aten.where.self, ops.WRITE_CACHE, OBSERVE,
)  # fmt: skip


class InsertObservers(Pass):
    """Return statistics of values beside the results.

    Args:
        sites: "linears": inputs of linears; "values": every floating-point value.
        only: Names of the sites to observe, without "range."; by default all.
    """

    def __init__(self, sites: Literal["linears", "values"] = "linears", only: Collection[str] | None = None) -> None:
        self.sites, self.only = sites, only

    def rewrite(self, graph: Graph) -> Rewrite:
        """Observe every site that is not observed yet."""
        skipped: list[str] = []
        named_values = computed_values(graph) if self.sites == "values" else _linear_inputs(graph, skipped)
        present = {tap.name for tap in graph.taps}
        observers = {node.args[0]: node for node in graph.calls(OBSERVE)}
        new = [(name, node) for name, node in named_values if PREFIX + name not in present]
        if self.only is not None:
            new = [(name, node) for name, node in new if name in self.only]
        for name, node in new:
            if node not in observers:
                observers[node] = _observe(graph, node)
            graph.add_tap(Tap(name=PREFIX + name, layer=layer_of(name), op=OP), observers[node])
        return Rewrite(changes=len(new), skipped=tuple(skipped))


def _linear_inputs(graph: Graph, skipped: list[str]) -> list[tuple[str, Node]]:
    """What every linear reads, by name; linears left alone are added to `skipped`."""
    named_values: dict[str, Node] = {}
    for node in graph.calls(*_LINEARS):
        named_weight = graph.weight_of(skip_casts(node.args[1]))
        if named_weight is None:
            skipped.append(f"{layer_path(node) or node.name}: the linear's weight is no input with a name")
            continue
        name = input_name(named_weight[0])
        if name in named_values:
            skipped.append(f"{name}: another linear of the same weight is observed")
            continue
        named_values[name] = node.args[0]
    return list(named_values.items())


def _observe(graph: Graph, node: Node) -> Node:
    """Right after the value, so that it need not live until the end."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    with graph.fx.inserting_before(following):
        return graph.call(OBSERVE, (node,), node)


def computed_values(graph: Graph) -> list[tuple[str, Node]]:
    """Every floating-point value that is computed from activations, with its name, in the order of execution.

    A trace of the same model in another dtype has the same names for the same values.
    """
    activations = {node for name, node in graph.inputs.items() if name != "start"}
    named_values, counts = [], dict[str, int]()
    for node in graph.calls_all():
        if not any(used in activations for used in node.all_input_nodes) or is_call(node, OBSERVE):
            continue
        value = node.meta["val"]
        # Sizes of activations say nothing of their numbers.
        if isinstance(value, (torch.Tensor, list, tuple)):
            activations.add(node)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and (name := _name(node)) is not None:
            counts[name] = counts.get(name, 0) + 1
            named_values.append((name if counts[name] == 1 else f"{name}.{counts[name]}", node))
    return named_values


def _name(node: Node) -> str | None:
    """Module path and operation; None for what computes nothing."""
    maker = node
    if is_call(node, operator.getitem):
        maker = node.args[0]
        if maker.target is not ops.ADD_RMS_NORM:  # what splits a tensor computes nothing
            return None
    elif is_call(node, *_MOVES):
        return None
    operation = maker.target._schema.name.split("::")[1]
    path = layer_path(maker)
    return f"{path}.{operation}" if path else operation


def narrow_values(graph: Graph, dtype: torch.dtype) -> dict[str, Node]:
    """The values of `computed_values` that a graph holds in a dtype, at once or after a cast."""
    return {
        name: node
        for name, node in computed_values(graph)
        if node.meta["val"].dtype == dtype
        or any(is_call(user, *CASTS) and user.meta["val"].dtype == dtype for user in node.users)
    }


def input_name(weight: str) -> str:
    """Name of what the linear of a weight, or of its codes, reads."""
    return f"{re.sub(r'[.]weight([.].*)?$', '', weight)}.input"


def layer_of(name: str) -> int | None:
    """Layer of a site; None before the first and after the last."""
    match = re.search(r"layers\.(\d+)", name)
    return int(match[1]) if match else None
