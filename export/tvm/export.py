"""The exporter of the target "tvm": a shared library and a file of weights."""

from __future__ import annotations

from pathlib import Path

import torch

from transom.backends.tvm.artifact import LIBRARY, PARAMETERS
from transom.backends.tvm.versions import PAIR
from transom.export.exporter import Lowered, Progress, entry
from transom.export.lowering import require_supported
from transom.export.options import Options
from transom.export.tvm.build import write_library
from transom.export.tvm.emitter import parameter_names, tap_shapes
from transom.export.tvm.lowerings import TABLE
from transom.export.tvm.processor import processor
from transom.graphs.graph import Graph
from transom.graphs.weight import Weight
from transom.zoo.checkpoints import safetensors_writer


def export(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write `model.so` and `params.safetensors`.

    Args:
        graph: A `decode` graph that the target's passes have rewritten.
        folder: Where; it exists.
        options: What is asked for.
        progress: Told of programs and of bytes.

    Raises:
        UnsupportedOpsError: Naming every operation that the target cannot lower.
        TargetError: If the processor is unknown, or nothing here can link for it.
    """
    require_supported(graph, TABLE, options.target)
    target_processor = processor(options.cpu)
    progress.on_program(0, 1)
    write_library(graph, target_processor, folder / LIBRARY, chunk=options.chunk)
    progress.on_program(1, 1)
    safetensors_writer.write(_stored(graph), folder / PARAMETERS, on_bytes=progress.on_bytes)
    return Lowered(
        entry=entry(graph, LIBRARY),
        libraries=tuple(PAIR),
        details={
            "machine": target_processor.machine,
            "triple": target_processor.triple,
            "cpu": target_processor.cpu,
            "needs": list(target_processor.needs),
            "parameters": parameter_names(graph),
            "tap_shapes": tap_shapes(graph),
        },
    )


def export_encoder(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write a library and its weights, called after the graph's task; for the errors see `export`."""
    require_supported(graph, TABLE, options.target)
    library, stored = f"{graph.task}.so", f"{graph.task}.safetensors"
    write_library(graph, processor(options.cpu), folder / library, chunk=1)
    safetensors_writer.write(_stored(graph), folder / stored, on_bytes=progress.on_bytes)
    details = {"weights": stored, "parameters": parameter_names(graph), "tap_shapes": tap_shapes(graph)}
    return Lowered(entry=entry(graph, library), details=details)


def _stored(graph: Graph) -> dict[str, Weight]:
    """Weights as the kernels take them: 8-bit floats are bytes."""
    return {
        name: weight.map_rows(lambda rows: rows.view(torch.uint8), dtype=torch.uint8)
        if weight.dtype == torch.float8_e4m3fn
        else weight
        for name, weight in graph.weights.items()
    }
