"""The exporter of the `tensorrt` target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from transom.backends.artifact import MODEL_FILE, Entry
from transom.backends.tensorrt.rings import ring_ports
from transom.backends.tensorrt.sidecar import IMAGE_CALLS, SUMMARIES, TEXT_CALLS, Profile, Shape, Sidecar
from transom.export.exporter import Lowered, Progress, entry
from transom.export.onnx import emitter
from transom.export.onnx.export import write_encoder
from transom.export.options import Options
from transom.export.tensorrt.dialect import DIALECT
from transom.export.tensorrt.verify.verify import require
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.state import BATCH, SLOTS, Port


def export(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write `model.onnx`, its data and `tensorrt.json`, and verify the model.

    Raises:
        UnsupportedOpsError: Naming every operation that the dialect cannot express.
        QuantizationError: If a scale is not positive in the compute dtype.
        DialectError: Naming everything that TensorRT would not take, or would compute otherwise.
    """
    sizes = {BATCH: 1, SLOTS: options.context}
    fixed = {symbol: sizes[axis] for symbol, axis in graph.symbols().items() if axis in sizes}
    model = emitter.write(graph, DIALECT, folder, on_bytes=progress.on_bytes, fixed=fixed)
    require(model)
    lowered = entry(graph, MODEL_FILE, **sizes)
    logits = dataclasses.replace(lowered.outputs["logits"], dtype="float32")
    rings = ring_ports(lowered.states) if "until" in graph.inputs else {}
    lowered = dataclasses.replace(lowered, inputs={**lowered.inputs, **rings}, outputs={"logits": logits})
    sidecar(lowered, options).write(folder)
    return Lowered(
        entry=lowered,
        libraries=("onnx",),
        details={"engines": []},
        not_done=_rounded_scales(options),
    )


def export_encoder(graph: Graph, folder: Path, options: Options, progress: Progress) -> Lowered:
    """Write an encoder of images and verify it; see `write_encoder`.

    Raises:
        UnsupportedOpsError: Naming every operation that the dialect cannot express.
        QuantizationError: If a scale is not positive in the compute dtype.
        DialectError: Naming everything that TensorRT would not take, or would compute otherwise.
    """
    lowered, model = write_encoder(graph, DIALECT, folder, progress)
    require(model)
    return lowered


def sidecar(lowered: Entry, options: Options) -> Sidecar:
    """What stands beside a model that decodes."""
    formats, dtype = scheme(options.quant).formats, options.dtype
    # For exactly one token, builders keep every weight in a second layout, and have no kernel for long caches.
    several = min(2, options.chunk)
    return Sidecar(
        dtype=dtype,
        aliases={f"{state.name}.out": state.name for state in lowered.states if state.is_ring},
        states=lowered.states,
        profiles=(
            _profile("prefill", lowered.inputs, options.chunk, options.chunk),
            _profile("decode", lowered.inputs, 1, several),
        ),
        least_sm=89 if "float8_e4m3fn" in formats else 80 if dtype == "bfloat16" else 75,
        calls=(IMAGE_CALLS if "until" in lowered.inputs else TEXT_CALLS)
        + ("" if all(state.is_ring for state in lowered.states) else SUMMARIES),
    )


def _profile(name: str, inputs: Mapping[str, Port], likely: int, most: int) -> Profile:
    return Profile(
        name=name,
        inputs={
            name: (_shape(port, 1, 1), _shape(port, likely, 1), _shape(port, most, most))
            for name, port in inputs.items()
            if None in port.sizes
        },
    )


def _shape(port: Port, tokens: int, positions: int) -> Shape:
    sizes = {BATCH: 1, "tokens": tokens, "positions": positions}
    return tuple(sizes[axis] if size is None else size for axis, size in zip(port.axes, port.sizes, strict=True))


def _rounded_scales(options: Options) -> tuple[str, ...]:
    """Notes on scales that lost digits: scales have the dtype of the computation, and some schemes have wider ones."""
    quant_scheme = scheme(options.quant)
    wide = [spec.describe() for spec in quant_scheme.specs if spec.scale_dtype == "float32"]
    if quant_scheme.activations is not None:
        wide.append("activations")
    if not wide:
        return ()
    share = {"bfloat16": "0.4%", "float16": "0.05%"}[options.dtype]
    return (
        f"scales of {' and '.join(dict.fromkeys(wide))} were rounded to {options.dtype}, each by at most {share}; "
        "those of int4_block32_bf16 and fp8_channel need not be",
    )
