"""A `score` graph cut into stages, one a layer, each run by itself on real tensors and any device.

So activations can be forgotten and computed again (gradient checkpointing), and a layer can be calibrated on what the
layers before it gave. The head's product is left out: logits of 262,144 tokens are never computed for all positions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from transom.errors import InvariantError
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call, layer_path
from transom.graphs.node import Node

Values = dict[Node, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of nodes.

    Attributes:
        layer: Index of the layer; None before the first and after the last.
        nodes: Calls, in order.
        inputs: Values of earlier stages that it reads.
        outputs: Its values that later stages read.
        weights: Names of the weights that it reads.
    """

    layer: int | None
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    weights: tuple[str, ...]


class Stages:
    """The stages of a graph.

    Args:
        graph: A `score` graph before any fusion, so that autograd knows every operation.
        device: Where to compute.

    Attributes:
        stages: In order: what comes before the layers, the layers, what comes after.
        table: Name of the head's weight, or of what it is computed from.

    Raises:
        InvariantError: If the graph is no `score` graph, or does not end in a linear over a softcap at most.
    """

    def __init__(self, graph: Graph, *, device: torch.device | str = "cpu") -> None:
        if graph.task != "score":
            raise InvariantError(f"only a 'score' graph can be cut into stages, not one for {graph.task!r}")
        self.graph, self.device = graph, torch.device(device)
        nodes = graph.placeholders()
        self._names = {nodes[placeholder]: name for placeholder, name in graph.weight_names().items()}
        self._tokens = graph.inputs["tokens"]
        self._head = _head(graph)
        self._hidden, self._table = self._head.args[0], self._head.args[1]
        self.stages = self._cut()

    @property
    def table(self) -> Node:
        """What the head multiplies by, [V, D]: a weight, or a computed one."""
        table: Node = self._table
        return table

    def _cut(self) -> list[Stage]:
        """Nodes of a layer bear its path; the others come before all layers, or after them if they read one."""
        wanted = _ancestors(self._hidden)
        calls = [node for node in self.graph.calls_all() if node in wanted]
        layers = [_layer(node) for node in calls]
        last = max((layer for layer in layers if layer is not None), default=-1)
        order: dict[int, list[Node]] = {index: [] for index in range(-1, last + 2)}
        for node, layer in zip(calls, layers, strict=True):
            if layer is None:
                before = all(_layer(used) is None for used in _ancestors(node))
                layer = -1 if before else last + 1
            order[layer].append(node)
        places = {node: place for place, nodes in order.items() for node in nodes}
        readers: dict[Node, set[int]] = {}
        for node, place in places.items():
            for used in node.all_input_nodes:
                readers.setdefault(used, set()).add(place)
        readers.setdefault(self._hidden, set()).add(last + 2)
        stages = []
        for place, nodes in order.items():
            used = dict.fromkeys(value for node in nodes for value in node.all_input_nodes)
            stages.append(
                Stage(
                    layer=place if 0 <= place <= last else None,
                    nodes=tuple(nodes),
                    inputs=tuple(n for n in used if n not in self._names and places.get(n, -2) != place),
                    outputs=tuple(n for n in nodes if any(reader > place for reader in readers.get(n, ()))),
                    weights=tuple(self._names[n] for n in used if n in self._names),
                )
            )
        return stages

    def run(self, stage: Stage, weights: Mapping[str, torch.Tensor], inputs: Sequence[Any], watch: Watch = None) -> Any:
        """Run one stage.

        Args:
            stage: Of `stages`.
            weights: By name; all that the stage reads.
            inputs: In the order of `stage.inputs`.
            watch: Called with every node and its value.

        Returns:
            Its outputs, a tuple.
        """
        values: Values = dict(zip(stage.inputs, inputs, strict=True))
        for node in stage.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: self._value(used, values, weights))
            if "device" in kwargs:
                kwargs = {**kwargs, "device": self.device}
            values[node] = node.target(*args, **kwargs)
            if watch is not None:
                watch(node, args, values[node])
        return tuple(values[node] for node in stage.outputs)

    def _value(self, node: Node, values: Values, weights: Mapping[str, torch.Tensor]) -> Any:
        return weights[self._names[node]] if node in self._names else values[node]

    def hidden(
        self, tokens_BT: torch.Tensor, weights: Mapping[str, torch.Tensor], *, recompute: bool = False
    ) -> torch.Tensor:
        """What the head reads, [B, T, D].

        Args:
            tokens_BT: int64.
            weights: Every weight of the graph, by name.
            recompute: Forget what a layer computed, and compute it again on the way back: memory for time.
        """
        values = self.start(tokens_BT)
        for stage in self.stages:
            inputs = [values[node] for node in stage.inputs]
            run: Callable[..., Any] = lambda *given, stage=stage: self.run(stage, weights, given)  # noqa: E731
            if recompute and stage.layer is not None:
                outputs = checkpoint(run, *inputs, use_reentrant=False)
            else:
                outputs = run(*inputs)
            values |= zip(stage.outputs, outputs, strict=True)
        hidden: torch.Tensor = values[self._hidden]
        return hidden

    def start(self, tokens_BT: torch.Tensor) -> Values:
        """Values to begin with, for running stages one by one."""
        return {self._tokens: tokens_BT.to(self.device)}

    def is_result(self, node: Node) -> bool:
        """Whether a node is what the head reads."""
        return node is self._hidden


Watch = Callable[[Node, Any, Any], None] | None


def _layer(node: Node) -> int | None:
    match = re.match(r"layers\.(\d+)", layer_path(node))
    return int(match[1]) if match else None


def _ancestors(node: Node) -> set[Node]:
    """The node and all that it is computed from."""
    ancestors, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in ancestors:
            ancestors.add(current)
            stack.extend(current.all_input_nodes)
    return ancestors


def _head(graph: Graph) -> Node:
    """The last linear; what follows may only be a softcap, which the loss applies by itself."""
    node: Any = graph.outputs["logits"]
    while is_call(node, aten.mul.Tensor, aten.tanh.default, aten.div.Tensor):
        node = node.args[0]
    if not is_call(node, aten.linear.default):
        raise InvariantError("the graph does not end in a linear: give the 'score' graph of a language model")
    head: Node = node
    return head
