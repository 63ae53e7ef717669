"""The exporter of both ONNX targets."""

from __future__ import annotations

from pathlib import Path

from transom.backends.artifact import MODEL_FILE
from transom.export.exporter import Lowered, Request, entry
from transom.export.onnx import emitter, onnxruntime, standard
from transom.graphs.graph import Graph

DIALECTS = {dialect.name: dialect for dialect in (onnxruntime.DIALECT, standard.DIALECT)}


def export(graph: Graph, folder: Path, request: Request) -> Lowered:
    """Write `model.onnx` and its data; see `emitter.write`."""
    emitter.write(graph, DIALECTS[request.target], folder, on_bytes=request.on_bytes)
    return Lowered(entry=entry(graph, MODEL_FILE), libraries=("onnx",))
