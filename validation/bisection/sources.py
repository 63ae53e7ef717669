"""The sources that a run can use: a target, a stage of its passes, the eager module, an artifact, a graph."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from transom.backends.artifact import DECODE, Manifest, read_manifest
from transom.backends.opening import open_session
from transom.backends.reference.runtime import Interpreter
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.errors import InvariantError, TargetError
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pass, Pipeline
from transom.passes.pipelines import PIPELINES, pipeline
from transom.passes.targets import TARGETS
from transom.validation.bisection.eager import Eager, EagerEncoder
from transom.validation.bisection.recording import Run
from transom.validation.candidates import Candidate, Opener
from transom.validation.oracle import quantized
from transom.zoo.model import Model

Source = str | Path | Graph | Session
"""What `bisect` takes."""

REFERENCE, EAGER = "reference", "eager"


def manifest_of(source: Source) -> Manifest | None:
    """The manifest of a source that is an artifact's folder; None of any other.

    Raises:
        TargetError: If a name is neither a target, nor a stage of one, nor a folder.
    """
    if isinstance(source, str):
        target, _, stage = source.partition("@")
        if target in (*PIPELINES, REFERENCE, EAGER) and not (stage and target not in PIPELINES):
            return None
        if not Path(source).exists():
            names = ", ".join((REFERENCE, EAGER, *PIPELINES))
            raise TargetError(f"{source!r} is no folder and no target: give a folder, {names}, or TARGET@PASS")
    elif not isinstance(source, Path):
        return None
    return read_manifest(Path(source))


@contextlib.contextmanager
def opened_once(source: Source, model: Model, *, quant: str, context: int, chunk: int) -> Iterator[Source]:
    """A session of a target or a folder, which serves every entry; any other source as it is.

    What had to be exported for it, in the scheme given, is removed at the end.

    Raises:
        ArtifactError: If a folder is no artifact.
    """
    if isinstance(source, str) and source in PIPELINES:
        options = Options.of(model, target=source, quant=quant, context=context, chunk=chunk)
        with _compiled(model, options) as session:
            yield session
    elif manifest_of(source) is not None:
        yield open_session(Path(str(source)), verify=False)
    else:
        yield source


def interpreted(graph: Graph, *, context: int, chunk: int) -> Run:
    """A graph, of any entry, run node by node."""
    if graph.task == DECODE:
        return ReferenceSession(graph, context=context, chunk=chunk)
    return Interpreter(graph).encode


def open_source(source: Source, model: Model, entry: str, *, quant: str, context: int, chunk: int) -> Run:
    """A run of an entry with taps, of what `opened_once` gave.

    Raises:
        TargetError: If a target or a pass is unknown.
        InvariantError: If a graph has no taps.
    """
    if isinstance(source, Session):
        return source
    if isinstance(source, Graph):
        if not source.taps:
            raise InvariantError("a graph without taps cannot be compared: run AddTaps on it before all other passes")
        return interpreted(source, context=context, chunk=chunk)
    graph = tapped(model.trace(task=entry))
    if source == EAGER and entry == DECODE:
        return Session(Eager(model, graph, quant, context=context, chunk=chunk))
    if source == EAGER:
        return EagerEncoder(model, graph, quant)
    if source == REFERENCE:
        return interpreted(reference_graph(graph, quant), context=context, chunk=chunk)
    target, _, stage = str(source).partition("@")
    passes = pipeline(target, chunk=chunk, scheme=scheme(quant)).passes
    return interpreted(Pipeline(until(passes, stage, target)).run(graph)[0], context=context, chunk=chunk)


def rebuilt(manifest: Manifest, model: Model) -> contextlib.AbstractContextManager[Session]:
    """Export an artifact again with taps, for one that was exported without."""
    return _compiled(model, dataclasses.replace(Options.of_artifact(manifest), cpu=_processor(manifest)))


def _processor(manifest: Manifest) -> str | None:
    """The processor of an artifact's machine code, as `compile_model` takes it; None for this machine."""
    details = manifest.details
    # A name alone stands for Linux; code for another system can only be compiled on it.
    if "cpu" not in TARGETS[manifest.target].options or "linux" not in details.get("triple", ""):
        return None
    # LLVM knows a "generic" processor of every family.
    return str(details["machine"] if details["cpu"] == "generic" else details["cpu"])


def _compiled(model: Model, options: Options) -> contextlib.AbstractContextManager[Session]:
    candidate = Candidate(name=options.target, options=options)
    return Opener(model).open(candidate, lambda stage, done, total: None, [AddTaps()])


def tapped(traced: Graph) -> Graph:
    """The graph as traced, with taps."""
    return Pipeline([AddTaps()]).run(traced)[0]


def reference_graph(traced: Graph, quant: str) -> Graph:
    """The graph as traced; with a scheme, its weights are the numbers that the codes mean."""
    return traced if quant == "none" else quantized(traced, quant)


def until(passes: Sequence[Pass], stage: str, target: str) -> Sequence[Pass]:
    """The passes of a target up to one of them.

    Raises:
        TargetError: If the list has no such pass.
    """
    names = [current.name for current in passes]
    if stage not in names:
        raise TargetError(f"{target} has no pass {stage!r}: choose one of {', '.join(names)}")
    return passes[: names.index(stage) + 1]


def stages_of(passes: Sequence[Pass], traced: Graph) -> list[tuple[str, Graph]]:
    """The name of every pass that changes the graph as traced with taps, and the graph after it."""
    stages: list[tuple[str, Graph]] = []
    after = Pipeline([each for each in passes if not isinstance(each, AddTaps)])
    _, records = after.run(traced, on_pass=lambda ran, graph: stages.append((ran.name, graph.clone())))
    return [stage for stage, done in zip(stages, records, strict=True) if done.changes]
