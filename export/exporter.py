"""What an exporter is: from a rewritten graph to files. One module a target, imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from transom.backends.artifact import Entry, TapRecord
from transom.errors import TargetError
from transom.export.options import Options
from transom.graphs.graph import Graph
from transom.passes.targets import TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Whom an export tells how far it is.

    Attributes:
        on_bytes: Called with the number of weight bytes written each time.
        on_program: Called with (done, total) as programs are compiled.
    """

    on_bytes: Callable[[int], None] = lambda count: None
    on_program: Callable[[int, int], None] = lambda done, total: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowered:
    """What an exporter tells the manifest.

    Attributes:
        entry: The graph as sessions see it.
        libraries: Distributions whose versions matter.
        details: Whatever the session of this target must know, as plain data.
        tpu: What the TPU's compiler said; see `export.xla`.
        not_done: In plain words, what was left undone.
    """

    entry: Entry
    libraries: tuple[str, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tpu: Mapping[str, Any] | None = None
    not_done: tuple[str, ...] = ()


def entry(graph: Graph, payload: str, **sizes: int) -> Entry:
    """What a manifest says of a graph.

    Args:
        graph: The graph.
        payload: File that a session opens first.
        sizes: Sizes of states that callers choose by the graph, and that the artifact fixes, by axis.
    """
    apart = {*graph.states, *(tap.name for tap in graph.taps)}
    return Entry(
        inputs={name: graph.port(name) for name in graph.input_names if name not in apart},
        outputs={name: graph.port(name) for name in graph.output_names if name not in apart},
        states=tuple(state.fixed(**sizes) for state in graph.states.values()),
        taps=tuple(TapRecord(name=tap.name, layer=tap.layer, op=tap.op) for tap in graph.taps),
        payload=payload,
    )


Exporter = Callable[[Graph, Path, Options, Progress], Lowered]
"""Writes a graph that the target's passes have rewritten into a folder that exists.

An encoder is a graph without states, whose task is the name of its entry; it knows its details by that name.
"""

EXPORTERS: dict[str, str] = {
    "onnxruntime": "transom.export.onnx.export",
    "onnx": "transom.export.onnx.export",
    "xla": "transom.export.xla.export",
    "tvm": "transom.export.tvm.export",
    "tensorrt": "transom.export.tensorrt.export",
}
"""Module whose `export` is the target's exporter, and `export_encoder` that of encoders of images."""


def exporter(target: str) -> Exporter:
    """Look a target's exporter up.

    Raises:
        TargetError: If the target is unknown, or a library that it needs is not installed.
    """
    export_function: Exporter = _module(target).export
    return export_function


def encoder_exporter(target: str) -> Exporter:
    """Look up what exports encoders of images to a target; see `exporter`."""
    export_function: Exporter = _module(target).export_encoder
    return export_function


def _module(target: str) -> ModuleType:
    if target not in EXPORTERS:
        raise TargetError(f"no target named {target!r}: choose one of {', '.join(EXPORTERS)}")
    try:
        return importlib.import_module(EXPORTERS[target])
    except ImportError as error:
        extra = TARGETS[target].extra
        wanted = f"pip install 'transom[{extra}]'" if extra else "install it"
        raise TargetError(f"the target {target!r} needs a library that is missing ({error}): {wanted}") from error
