"""The reference: a graph interpreted in PyTorch. Every other backend is held against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.session import Float, Session, Tokenizer, grown
from transom.graphs import ops  # noqa: F401 (registers the fused operations)
from transom.graphs.graph import Graph
from transom.graphs.state import State
from transom.graphs.weight import read_all


class ReferenceSession(Session):
    """A `decode` graph, at any stage of the passes, run node by node.

    Args:
        graph: The graph; its weights are read into memory here.
        context: Longest sequence, in tokens.
        chunk: Most new tokens in one call; bounded caches must have been made for at least as many.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, graph: Graph, *, context: int, chunk: int, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(
            context=context,
            chunk=chunk,
            vocab_size=int(graph.outputs["logits"].meta["val"].shape[-1]),
            states=tuple(graph.states.values()),
            stop_ids=tokenizer.stop_ids if tokenizer else (),
            tokenizer=tokenizer,
        )
        self._interpreter = torch.fx.Interpreter(graph.module)
        weights = read_all(graph.weights)
        names, passed = graph.weight_names(), {node.name: name for name, node in graph.inputs.items()}
        self._inputs: list[str | torch.Tensor] = [
            weights[names[placeholder]] if placeholder in names else passed[placeholder]
            for placeholder in graph.placeholders()
        ]
        self._outputs = graph.output_names
        self._tensors: dict[str, torch.Tensor] = {}
        self._taps = [tap.name for tap in graph.taps]

    def _run(self, tokens: NDArray[np.int64], logit_positions: NDArray[np.int64]) -> Float:
        given = {
            "tokens": torch.from_numpy(tokens)[None],
            "start": torch.tensor(self.position),
            "logit_positions": torch.from_numpy(logit_positions),
            **self._tensors,
        }
        inputs = [given[value] if isinstance(value, str) else value for value in self._inputs]
        with torch.no_grad():
            returned = dict(zip(self._outputs, self._interpreter.run(*inputs), strict=True))
        self._tensors = {name: returned[name] for name in self._tensors}
        self.tapped = {name: _array(returned[name]) for name in self._taps}
        rows: Float = returned["logits"][0].float().numpy()
        return rows

    def _allocate(self, slots: int) -> None:
        new = {state.name: torch.zeros(state.shape(slots), dtype=getattr(torch, state.dtype)) for state in self.states}
        self._tensors = new | {name: grown(old, new[name]) for name, old in self._tensors.items()}

    def _state_arrays(self) -> Iterator[tuple[State, Any]]:
        yield from ((state, self._tensors[state.name]) for state in self.states if state.name in self._tensors)


def _array(value: torch.Tensor) -> NDArray[Any]:
    """As numpy knows it: what is narrower than float32 is widened; statistics are float64 and stay so."""
    return (value if value.dtype == torch.float64 else value.float()).numpy()
