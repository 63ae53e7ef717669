"""What an exporter is: from a rewritten graph to files. One module a target, imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transom.backends.artifact import CacheRecord
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
        payload: File that a session opens first.
        libraries: Distributions whose versions matter.
        caches: Caches of the artifact, where they differ from the graph's; a runtime of static shapes has no growing
            ones.
        details: Whatever the session of this target must know, as plain data.
        tpu: What the TPU's compiler said; see `export.xla`.
        not_done: In plain words, what was left undone.
    """

    payload: str
    libraries: tuple[str, ...] = ()
    caches: tuple[CacheRecord, ...] | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tpu: Mapping[str, Any] | None = None
    not_done: tuple[str, ...] = ()


Exporter = Callable[[Graph, Path, Options, Progress], Lowered]
"""Writes a graph that the target's passes have rewritten into a folder that exists."""

EXPORTERS: dict[str, str] = {
    "onnxruntime": "transom.export.onnx.export",
    "onnx": "transom.export.onnx.export",
    "xla": "transom.export.xla.export",
    "tvm": "transom.export.tvm.export",
    "tensorrt": "transom.export.tensorrt.export",
}
"""Module whose `export` is the target's exporter."""


def exporter(target: str) -> Exporter:
    """Look a target's exporter up.

    Raises:
        TargetError: If the target is unknown, or a library that it needs is not installed.
    """
    if target not in EXPORTERS:
        raise TargetError(f"no target named {target!r}: choose one of {', '.join(EXPORTERS)}")
    try:
        export_function: Exporter = importlib.import_module(EXPORTERS[target]).export
    except ImportError as error:
        extra = TARGETS[target].extra
        wanted = f"pip install 'transom[{extra}]'" if extra else "install it"
        raise TargetError(f"the target {target!r} needs a library that is missing ({error}): {wanted}") from error
    return export_function
