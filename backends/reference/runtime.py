"""The reference: a graph interpreted in PyTorch. Every other backend is held against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from transom.backends.runtime import Call, Float, Result, Runtime, grown
from transom.graphs import ops  # noqa: F401 (registers the fused operations)
from transom.graphs.graph import Graph
from transom.graphs.state import State
from transom.graphs.weight import read_all


class Reference(Runtime):
    """A `decode` graph, at any stage of the passes, run node by node.

    Args:
        graph: The graph; its weights are read into memory here.
        context: Longest sequence, in tokens.
        chunk: Most new tokens in one call; bounded caches must have been made for at least as many.
        rows: Sequences in every call.
        encoder: Makes soft tokens [1, Q, D] of pixels, for a graph that takes them.
    """

    title = "the reference"

    def __init__(self, graph: Graph, *, context: int, chunk: int, rows: int = 1, encoder: Graph | None = None) -> None:
        super().__init__(
            context=context,
            chunk=chunk,
            vocab_size=int(graph.outputs["logits"].meta["val"].shape[-1]),
            states=tuple(graph.states.values()),
            rows=rows,
            width=int(graph.inputs["soft"].meta["val"].shape[-1]) if "soft" in graph.input_names else 0,
        )
        self._decoder = Interpreter(graph)
        self._encoder = None if encoder is None else Interpreter(encoder)
        self._tensors: dict[str, torch.Tensor] = {}
        self._taps = [tap.name for tap in graph.taps]

    def _run(self, call: Call) -> Result:
        given = {
            "tokens": torch.from_numpy(call.tokens),
            "start": torch.tensor(call.start[0]),
            "logit_positions": torch.from_numpy(call.logit_positions),
            **self._tensors,
        }
        if call.until is not None and call.soft is not None:
            given |= {"until": torch.from_numpy(call.until), "soft": torch.from_numpy(call.soft)}
        returned = self._decoder.run(given)
        self._tensors = {name: returned[name] for name in self._tensors}
        taps = {name: _array(returned[name]) for name in self._taps}
        return Result(logits=returned["logits"].float().numpy(), taps=taps)

    def encode(self, pixels: Float) -> Mapping[str, NDArray[Any]]:
        return super().encode(pixels) if self._encoder is None else self._encoder.encode(pixels)

    def allocate(self, slots: int) -> None:
        new = {
            state.name: torch.zeros(state.shape(slots, batch=self.rows), dtype=getattr(torch, state.dtype))
            for state in self.states
        }
        self._tensors = new | {name: grown(old, new[name]) for name, old in self._tensors.items()}

    def state_arrays(self) -> Iterator[tuple[State, Any]]:
        yield from ((state, self._tensors[state.name]) for state in self.states if state.name in self._tensors)


class Interpreter:
    """A graph with its weights in memory."""

    def __init__(self, graph: Graph) -> None:
        self._interpreter = torch.fx.Interpreter(graph.module)
        weights = read_all(graph.weights)
        names, passed = graph.weight_names(), {node.name: name for name, node in graph.inputs.items()}
        self._inputs: list[str | torch.Tensor] = [
            weights[names[placeholder]] if placeholder in names else passed[placeholder]
            for placeholder in graph.placeholders()
        ]
        self._outputs = graph.output_names

    def run(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is returned by name, of inputs by name."""
        inputs = [given[value] if isinstance(value, str) else value for value in self._inputs]
        with torch.no_grad():
            return dict(zip(self._outputs, self._interpreter.run(*inputs), strict=True))

    def encode(self, pixels: Float) -> dict[str, NDArray[Any]]:
        """Of an encoder's graph; see `Runtime.encode`."""
        return {name: _array(value) for name, value in self.run({"pixels": torch.from_numpy(pixels)}).items()}


def _array(value: torch.Tensor) -> NDArray[Any]:
    """As numpy knows it: what is narrower than float32 is widened; statistics are float64 and stay so."""
    return (value if value.dtype == torch.float64 else value.float()).numpy()
