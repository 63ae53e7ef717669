"""What is validated: the reference, a model compiled for a target, or an artifact that somebody exported."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from transom.backends.artifact import Manifest, read_manifest
from transom.backends.opening import open_session
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.compiler import compile_model, measure_on_text
from transom.errors import TargetError
from transom.export.exporter import exporter
from transom.export.options import Options, check_options
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.base import Pass, Pipeline
from transom.passes.pipelines import Measure, pipeline
from transom.passes.targets import TARGETS
from transom.zoo.model import Model

REFERENCE = "reference"
REFERENCE_PIPELINE = "onnx"
"""Whose rewritten graph the reference interprets: the passes that all targets share, before any fused attention."""

OnProgress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to validate.

    Attributes:
        name: What to call it in the results.
        options: What it is, or will be, compiled with; their target may be "reference" too.
        folder: The artifact, if it exists or will be kept.
        exported: Whether the artifact exists already.
        overwrite: Whether what is compiled may replace an artifact of that name.
        threads: Of the runtime; by default its own choice.
    """

    name: str
    options: Options
    folder: Path | None = None
    exported: bool = False
    overwrite: bool = False
    threads: int | None = None

    @property
    def target(self) -> str:
        """What it runs on: "reference" or a key of `passes.targets.TARGETS`."""
        return self.options.target


def check_targets(names: list[str], *, quant: str, dtype: str | None) -> None:
    """Raise `TargetError` for a target that is unknown, given twice, lacks a library, or cannot hold the scheme."""
    known = (REFERENCE, *TARGETS)
    for name in names:
        if name not in known:
            raise TargetError(f"no target named {name!r}: choose one of {', '.join(known)}")
        if names.count(name) > 1:
            raise TargetError(f"the target {name!r} is given twice: name it once")
        if name != REFERENCE:
            exporter(name)
            check_options(name, quant, dtype)


def installed_targets(*, quant: str, dtype: str | None) -> tuple[list[str], dict[str, str]]:
    """All targets that can run this here, and why the others cannot."""
    runnable, missing = [REFERENCE], {}
    for name in TARGETS:
        try:
            check_targets([name], quant=quant, dtype=dtype)
            runnable.append(name)
        except TargetError as error:
            missing[name] = str(error)
    return runnable, missing


class Opener:
    """Opens candidates of one model."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._ranges: Mapping[str, float] | None = None

    @contextmanager
    def open(
        self, candidate: Candidate, on_progress: OnProgress, before: Sequence[Pass] | None = None
    ) -> Iterator[Session]:
        """A session, compiled first if need be; what was compiled for it alone is removed at the end.

        Args:
            candidate: What to open.
            on_progress: Told of the steps of compiling.
            before: Passes to run before the target's own; an artifact that exists is left aside for a new one.
        """
        if candidate.target == REFERENCE:
            yield self._reference(candidate, before or (), on_progress)
            return
        if candidate.exported and candidate.folder is not None and before is None:
            # Its hashes were checked when it was named.
            yield open_session(candidate.folder, threads=candidate.threads, verify=False)
            return
        with tempfile.TemporaryDirectory(prefix="transom-validate-", ignore_cleanup_errors=True) as scratch:
            kept = candidate.folder if before is None else None
            folder = Path(scratch) / candidate.target if kept is None else kept
            compile_model(
                self.model,
                candidate.options,
                before=before or (),
                out=folder,
                overwrite=candidate.overwrite,
                on_progress=on_progress,
            )
            # What was written a moment ago need not be hashed again.
            yield open_session(folder, threads=candidate.threads, verify=False)

    def _reference(self, candidate: Candidate, before: Sequence[Pass], on_progress: OnProgress) -> ReferenceSession:
        options = candidate.options
        measured = measure_on_text(self.model, options, on_progress=on_progress).ranges

        def ranges(graph: Graph) -> Mapping[str, float]:
            if self._ranges is None:
                assert measured is not None
                self._ranges = measured(graph)
            return self._ranges

        # Activations stay as they are: what rounding them costs is for the comparison to tell.
        measure = Measure(ranges=ranges if measured else None)
        listed = pipeline(REFERENCE_PIPELINE, chunk=options.chunk, scheme=scheme(options.quant), measure=measure)
        traced = self.model.trace(dtype=getattr(torch, options.dtype))
        graph, _ = Pipeline([*before, *listed.passes]).run(traced)
        return ReferenceSession(graph, context=options.context, chunk=options.chunk)


def artifact_candidate(folder: Path, threads: int | None) -> tuple[Candidate, Manifest]:
    """An artifact as it stands.

    Raises:
        ArtifactError: If the folder is no artifact, or is damaged.
    """
    manifest = read_manifest(folder)
    options = Options.of_artifact(manifest)
    candidate = Candidate(name=manifest.target, options=options, folder=folder, exported=True, threads=threads)
    return candidate, manifest


def disambiguate(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Add its folder to the name of every artifact whose name another candidate shares."""
    names = [candidate.name for candidate in candidates]
    return [
        dataclasses.replace(candidate, name=f"{candidate.name} ({candidate.folder})")
        if candidate.exported and names.count(candidate.name) > 1
        else candidate
        for candidate in candidates
    ]
