"""The exporter of the `tensorrt` target."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from transom.backends.artifact import MODEL_FILE
from transom.backends.tensorrt.sidecar import Profile, Sidecar
from transom.export.exporter import Lowered, Progress, entry
from transom.export.onnx import emitter
from transom.export.options import Options
from transom.export.tensorrt.dialect import DIALECT
from transom.export.tensorrt.verify.verify import require
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.state import BATCH, SLOTS, State


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
    lowered = dataclasses.replace(lowered, outputs={"logits": logits})
    sidecar(lowered.states, options).write(folder)
    return Lowered(
        entry=lowered,
        libraries=("onnx",),
        details={"engines": []},
        not_done=_rounded_scales(options),
    )


def sidecar(states: Sequence[State], options: Options) -> Sidecar:
    """What stands beside the model."""
    numbers, dtype = scheme(options.quant).numbers, options.dtype
    # For exactly one token, builders keep every weight in a second layout, and have no kernel for long caches.
    several = min(2, options.chunk)
    return Sidecar(
        dtype=dtype,
        aliases={f"{state.name}.out": state.name for state in states},
        states=tuple(states),
        profiles=(_profile("prefill", options.chunk, options.chunk), _profile("decode", 1, several)),
        least_sm=89 if "float8_e4m3fn" in numbers else 80 if dtype == "bfloat16" else 75,
    )


def _profile(name: str, likely: int, most: int) -> Profile:
    return Profile(
        name=name,
        inputs={
            "tokens": ((1, 1), (1, likely), (1, most)),
            "logit_positions": ((1,), (1,), (most,)),
        },
    )


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
