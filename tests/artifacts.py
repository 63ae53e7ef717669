"""An artifact of the tiny model, beside the graph that it was made from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import transom
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.graphs.graph import Graph

CHUNK = 37
"""Most tokens in one call: more than two windows, and divides nothing."""

THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
"""Threads for a large model: this process's share of the cores, as threads that wait for a core spin on another."""


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
