"""The exporter of both ONNX targets."""

from __future__ import annotations

from pathlib import Path

import onnx

from transom.backends.artifact import MODEL_FILE, PREPROCESS_FILE
from transom.export.exporter import Lowered, Progress, entry
from transom.export.onnx import emitter, onnxruntime, standard
from transom.export.onnx.dialect import Dialect
from transom.export.onnx.preprocess import preprocessing_model
from transom.export.options import Options
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.images.resize import PixelSpec

DIALECTS = {dialect.name: dialect for dialect in (onnxruntime.DIALECT, standard.DIALECT)}


def export(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write `model.onnx` and its data; see `emitter.write`."""
    emitter.write(graph, DIALECTS[options.target], folder, on_bytes=progress.on_bytes)
    return Lowered(entry=entry(graph, MODEL_FILE), libraries=("onnx",), not_done=_widened(graph, options.target))


def _widened(graph: Graph, target: str) -> tuple[str, ...]:
    """Lines on codes that are written in a wider format."""
    if target != onnxruntime.DIALECT.name:
        return ()
    calls = graph.calls(ops.LINEAR_QUANTIZED, ops.EXPERTS_QUANTIZED)
    return tuple(
        f"{narrow}: its codes are written as {wide}, which mean the same, as the provider has no products with them"
        for narrow, wide in onnxruntime.WIDENED.items()
        if any(narrow in node.args for node in calls)
    )


def export_encoder(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write an encoder; see `write_encoder`."""
    return write_encoder(graph, DIALECTS[options.target], folder, progress)[0]


def write_encoder(graph: Graph, dialect: Dialect, folder: Path, progress: Progress) -> tuple[Lowered, onnx.ModelProto]:
    """Write a model and its data, called after the graph's task, and one that makes its pixels of an image.

    Returns:
        What a manifest says of it, and the model without its data.
    """
    file = f"{graph.task}.onnx"
    size = int(graph.inputs["pixels"].meta["val"].shape[-1])
    (folder / PREPROCESS_FILE).write_bytes(preprocessing_model(PixelSpec(size=size)).SerializeToString())
    model = emitter.write(graph, dialect, folder, on_bytes=progress.on_bytes, file=file)
    return Lowered(entry=entry(graph, file)), model
