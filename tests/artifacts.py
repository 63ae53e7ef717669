"""Artifacts of the tiny model, and folders that the workers of a run share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

import transom
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.pipelines import pipeline

CHUNK = 37
"""Most tokens in one call: more than two windows, and divides nothing."""

THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
"""Threads for a large model: this process's share of the cores, as threads that wait for a core spin on another."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """An artifact, and what it was lowered from."""

    folder: Path
    traced: Graph
    options: Options

    @functools.cached_property
    def graph(self) -> Graph:
        """The very graph that it was lowered from."""
        passes = pipeline(self.options.target, chunk=self.options.chunk, scheme=scheme(self.options.quant))
        return passes.run(self.traced)[0]

    def session(self) -> Session:
        return transom.open(self.folder, threads=1)

    def reference(self) -> ReferenceSession:
        return ReferenceSession(self.graph, context=self.options.context, chunk=self.options.chunk)


class Export(Protocol):
    """Compiles the tiny model, each way once a run; nobody may write to the folder. Options are those of `Options.of`,
    with chunks of `CHUNK`.
    """

    def __call__(self, target: str, quant: str = "none", **options: Any) -> Exported: ...


SHARED = "TRANSOM_TEST_SHARED"
"""Environment variable: a folder of the run, for all workers."""


def shared(name: str, *content: object, write: Callable[[Path], object]) -> Path:
    """A folder that the worker that comes first writes for all of them, and that nobody may change.

    Args:
        name: What to call it.
        content: All that decides what stands in it.
        write: Makes the folder at a path where nothing is.
    """
    root = Path(os.environ[SHARED])
    folder = root / f"{name}-{hashlib.sha256(repr(content).encode()).hexdigest()[:16]}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            write(part)
            part.rename(folder)
    return folder
