"""An artifact of the tiny model, beside the graph that it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import transom
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.graphs.graph import Graph

CHUNK = 37
"""Most tokens in one call: more than two windows, and divides nothing."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """An artifact, and the very graph that it was lowered from."""

    folder: Path
    graph: Graph

    def session(self) -> Session:
        return transom.open(self.folder, threads=1)

    def reference(self) -> ReferenceSession:
        return ReferenceSession(self.graph, context=512, chunk=CHUNK)


Export = Callable[[str, str], Exported]
"""Compiles the tiny model for (target, quant)."""
