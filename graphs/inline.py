"""Inline: a graph as a plain exported program, for tools that know nothing of this project.

torch-xla and others take a `torch.export.ExportedProgram` of ATen operations with sizes that are numbers. So every
fused operation is replaced by its reference body, and the symbols by the sizes that are asked for.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, export

from transom.errors import TraceError
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.weight import read_all


class _Plain(nn.Module):
    """A graph with its weights as buffers."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        self._buffers_of: dict[str, str] = {}
        shared: dict[int, str] = {}
        tensors = read_all(graph.weights)
        for placeholder, name in graph.weight_names().items():
            weight = graph.weights[name]
            if id(weight) not in shared:
                shared[id(weight)] = name.replace(".", "_")
                self.register_buffer(shared[id(weight)], tensors[name])
            self._buffers_of[placeholder] = shared[id(weight)]

    def forward(self, *inputs: torch.Tensor) -> Any:
        given, buffers = iter(inputs), self._buffers_of
        values = [
            getattr(self, buffers[name]) if name in buffers else next(given) for name in self._graph.placeholders()
        ]
        return torch.fx.Interpreter(self._graph.module).run(*values)


def inline(graph: Graph, *, tokens: int, slots: int, positions: int = 1, batch: int = 1) -> ExportedProgram:
    """Export a `decode` graph again, in plain operations and with sizes that are numbers.

    Its inputs are those of the graph: tokens [batch, tokens], start [], logit_positions [positions], states; its
    weights are read into memory.

    Args:
        graph: At any stage of the passes.
        tokens: T, new tokens in a call.
        slots: S of states that grow; bounded ones keep theirs.
        positions: P, positions whose logits are wanted.
        batch: B.

    Raises:
        TraceError: If the graph is no `decode` graph, or torch.export cannot trace it.
    """
    if graph.task != "decode":
        raise TraceError(f"only a 'decode' graph can be inlined, not one for {graph.task!r}: trace it with that task")
    values = {
        "tokens": torch.zeros((batch, tokens), dtype=torch.int64),
        "start": torch.tensor(0),
        "logit_positions": torch.zeros(positions, dtype=torch.int64),
    }
    values |= {
        name: torch.zeros(state.shape(slots, batch=batch), dtype=getattr(torch, state.dtype))
        for name, state in graph.states.items()
    }
    inputs = tuple(values[name] for name in graph.input_names)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            program: ExportedProgram = export(_Plain(graph), inputs, strict=False).run_decompositions(ops.BODIES)
        except Exception as error:
            raise TraceError(f"torch.export could not trace the inlined graph: {error}") from error
    return program
