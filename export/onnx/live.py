"""ONNX models without weights: each is an input, so that a runtime reads them where they change."""

from __future__ import annotations

import io

import numpy as np
import onnx
import torch

from transom.export.lowering import require_supported
from transom.export.onnx.data import DataFile
from transom.export.onnx.dialect import Dialect
from transom.export.onnx.emitter import Emitter
from transom.graphs.graph import Graph
from transom.graphs.weight import Weight


def live_model(graph: Graph, dialect: Dialect) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """A model, and what its inputs hold beside those of the graph, by name.

    Args:
        graph: A graph that passes have rewritten; those of its weights that are float32 become inputs.
        dialect: What to write.

    Raises:
        UnsupportedOpsError: Naming every operation that the dialect cannot express.
    """
    require_supported(graph, dialect.lowerings, dialect.name)
    emitter = _LiveEmitter(graph, dialect)
    return emitter.emit(), emitter.recipes


class _LiveEmitter(Emitter):
    def __init__(self, graph: Graph, dialect: Dialect) -> None:
        super().__init__(graph, dialect, DataFile(io.BytesIO(), "", on_bytes=lambda count: None))
        self.recipes: dict[str, Weight] = {}

    def initializer(
        self,
        name: str,
        weight: Weight,
        element_type: int | None = None,
        *,
        transposed: bool = False,
        stacked: int | None = None,
    ) -> str:
        if weight.dtype != torch.float32:  # a constant, such as positions: nothing trains it
            return self.number(weight.read(), weight.dtype)
        if element_type is not None or transposed:
            raise TypeError(f"{name} is to be written in another type or layout than it has: only plain weights live")
        self.recipes[name] = weight
        value = self.input(name, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
        if stacked is None:
            return value
        shape = (stacked, weight.shape[0] // stacked, *weight.shape[1:])
        return str(self.op("Reshape", value, self.constant(np.array(shape))))
