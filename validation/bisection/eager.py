"""The plain module as a runtime, its intermediate values taken by hooks: nothing is rewritten.

The graph says where each tap stands in the module: it is what some submodule returns, or what one is given. A value
that passes no submodule's border, such as a rotation's, is computed once more from those before it, by the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from transom.backends.runtime import Call, Float, Result, Runtime, grown
from transom.graphs.graph import Graph, run_nodes
from transom.graphs.match import aten, is_call, layer_path
from transom.graphs.node import Node
from transom.graphs.state import State, by_layer
from transom.validation.oracle import round_weights
from transom.zoo.model import Model


class _Watched:
    """A module whose values are taken where the taps of a graph of it stand."""

    def __init__(self, model: Model, graph: Graph, quant: str) -> None:
        self.module, self._graph = model.eager(), graph
        if quant != "none":
            round_weights(self.module, graph, quant)
        self._tapped: dict[str, NDArray[Any]] = {}
        self._taps = {tap.name: graph.outputs[tap.name] for tap in graph.taps}
        for name, node in self._taps.items():
            self._watch(name, node)

    def _watch(self, name: str, node: Node) -> None:
        """Keep what a submodule returns, or is given, under the name of its tap."""
        path = layer_path(node)
        readers = [layer_path(user) for user in _readers(node)]
        if path and not any(_is_inside(reader, path) for reader in readers):
            self.module.get_submodule(path).register_forward_hook(lambda _, __, value: self._keep(name, value))
            return
        given = [reader for reader in readers if reader != path and _is_inside(reader, path)]
        if given:
            # The outermost of the submodules that the reader stands in and the value does not.
            inner = min(given, key=len).removeprefix(path).lstrip(".").split(".")
            step = 2 if len(inner) > 1 and inner[1].isdigit() else 1
            reader = ".".join([*([path] if path else []), *inner[:step]])
            self.module.get_submodule(reader).register_forward_pre_hook(lambda _, args: self._keep(name, args[0]))

    def _keep(self, name: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        self._tapped[name] = tensor.numpy()

    def run(
        self, function: Callable[[], Any], given: Mapping[str, torch.Tensor]
    ) -> tuple[Any, dict[str, NDArray[Any]]]:
        """What a function of the module returns, and the taps, of what it is given by the names of the graph."""
        self._tapped = {}
        with torch.no_grad():
            returned = function()
        # What no hook saw is computed.
        known: dict[Node, Any] = {self._taps[name]: torch.from_numpy(value) for name, value in self._tapped.items()}
        nodes, weights = self._graph.placeholders(), self.module.state_dict()
        known |= {nodes[node]: weights[name] for node, name in self._graph.weight_names().items() if name in weights}
        known |= {node: given[name] for name, node in self._graph.inputs.items() if name in given}
        missing = [name for name in self._taps if name not in self._tapped]
        values = run_nodes([self._taps[name] for name in missing], known)
        self._tapped |= {name: values[self._taps[name]].numpy() for name in missing}
        return returned, {name: self._tapped[name] for name in self._taps}


class EagerEncoder:
    """The model file's encoder of images run as it stands; arguments as those of `Eager`."""

    def __init__(self, model: Model, graph: Graph, quant: str) -> None:
        self._watched, self._task = _Watched(model, graph, quant), graph.task

    def __call__(self, pixels: Float) -> dict[str, NDArray[Any]]:
        """See `Runtime.encode`."""
        given = torch.from_numpy(pixels)
        encode = getattr(self._watched.module, self._task)
        soft, taps = self._watched.run(lambda: encode(given), {"pixels": given})
        return {"soft": soft.numpy(), **taps}


class Eager(Runtime):
    """The model file run as it stands, with caches that grow.

    Args:
        model: The model; its weights are read into memory here.
        graph: Its decode graph as traced, with taps.
        quant: Scheme whose numbers the weights are rounded to.
    """

    title = "the plain model"

    def __init__(self, model: Model, graph: Graph, quant: str, *, context: int, chunk: int) -> None:
        vocab_size = int(graph.outputs["logits"].meta["val"].shape[-1])
        states = tuple(graph.states.values())
        width = int(graph.inputs["soft"].meta["val"].shape[-1]) if "soft" in graph.inputs else 0
        super().__init__(context=context, chunk=chunk, vocab_size=vocab_size, states=states, width=width)
        self._watched = _Watched(model, graph, quant)
        self._tensors: dict[str, torch.Tensor] = {}

    def _run(self, call: Call) -> Result:
        layers = by_layer(self.states)
        rings = [tuple(self._tensors[state.name] for state in layer) for layer in layers]
        ids, start, images = torch.from_numpy(call.tokens), torch.tensor(call.start[0]), {}
        if call.until is not None and call.soft is not None:
            images = {"until": torch.from_numpy(call.until), "soft": torch.from_numpy(call.soft)}

        def forward() -> torch.Tensor:
            logits_BTV, written = self._watched.module(ids, start, rings, **images)
            pairs = (
                pair
                for layer, tensors in zip(layers, written, strict=True)
                for pair in zip(layer, tensors, strict=True)
            )
            self._tensors = {state.name: tensor for state, tensor in pairs}
            logits_BPV: torch.Tensor = logits_BTV[:, torch.from_numpy(call.logit_positions)]
            return logits_BPV

        logits, taps = self._watched.run(forward, {"tokens": ids, "start": start, **images, **self._tensors})
        return Result(logits=logits.numpy(), taps=taps)

    def allocate(self, slots: int) -> None:
        new = {state.name: torch.zeros(state.shape(slots)) for state in self.states}
        self._tensors = new | {name: grown(old, new[name]) for name, old in self._tensors.items()}

    def state_arrays(self) -> Iterator[tuple[State, Any]]:
        yield from ((state, self._tensors[state.name]) for state in self.states if state.name in self._tensors)


def _readers(node: Node) -> list[Node]:
    """What computes with a node; neither the graph's output nor an assertion does."""
    return [
        user
        for user in node.users
        if user.op == "call_function" and not is_call(user, aten._assert_tensor_metadata.default)
    ]


def _is_inside(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")
