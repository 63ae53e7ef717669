"""What is validated: the reference, a model compiled for a target, or artifacts that somebody exported of one model."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from transom.backends.artifact import Manifest, read_manifest
from transom.backends.folder import MANIFEST, check_absent
from transom.backends.opening import open_session
from transom.backends.reference.runtime import Reference
from transom.backends.session import Session
from transom.backends.threads import check_threads
from transom.compiler import compile_model, measure_on_text
from transom.errors import ConfigError, TargetError
from transom.export.exporter import exporter
from transom.export.options import Options, check_options
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.passes.base import Pass, Pipeline
from transom.passes.pipelines import Measure, pipeline
from transom.passes.targets import TARGETS
from transom.validation.certificate import check_writable
from transom.zoo.model import Model, load

REFERENCE = "reference"
REFERENCE_PIPELINE = "onnx"
"""Whose rewritten graph the reference interprets: the passes that all targets share, before any fused attention."""

OnProgress = Callable[[str, int, int], None]

_SEED = re.compile(r"seed (\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to validate.

    Attributes:
        options: What it is, or will be, compiled with; their target may be "reference" too.
        folder: The artifact, if it exists or will be kept.
        exported: Whether the artifact exists already; if not, it may `overwrite` one of its name.
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

        With passes to run `before` the target's own, an artifact that exists is left aside for a new one.
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

    def _reference(self, candidate: Candidate, before: Sequence[Pass], on_progress: OnProgress) -> Session:
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
        dtype, config = getattr(torch, options.dtype), self.model.config
        graph, _ = Pipeline([*before, *listed.passes]).run(self.model.trace(dtype=dtype))
        # What is measured on text says nothing of images.
        plain = pipeline(REFERENCE_PIPELINE, chunk=options.chunk, scheme=scheme(options.quant))
        encoder = None
        for name in config.encoders:
            encoder, _ = plain.run(self.model.trace(task=name, dtype=torch.float32 if measured else dtype))
        runtime = Reference(graph, context=options.context, chunk=options.chunk, encoder=encoder)
        return Session(runtime, images=config.images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What to validate.

    Attributes:
        compiles: Whether a model was named, to be compiled for the targets.
    """

    model: Model
    artifacts: tuple[Candidate, ...]
    compiles: bool


def read_inputs(
    named: str | Path | Model | Sequence[str | Path | Model],
    *,
    model: str | Path | Model | None,
    weights: Literal["checkpoint", "random"],
    seed: int,
    threads: int | None,
    same_weights: bool = True,
    images: bool = False,
    mmproj: Path | None = None,
    rope_scaling: str | None = None,
) -> Inputs:
    """Tell models and artifacts apart, and load the model.

    `model` is the model if it is not named and not where the artifacts' manifests say. Without `same_weights`,
    artifacts may be of other weights than a model that was named, such as those that were trained on from it. With
    `images`, a model that sees them is loaded with its encoder, `mmproj` if that is a file of its own. A model that is
    named is stretched by `rope_scaling`.

    Raises:
        ConfigError: If nothing, or more than one model, is given, artifacts are not of the model, or `mmproj` has no
            model to belong to.
        ArtifactError: If an artifact is damaged.
        TargetError: If threads are far more than cores.
    """
    check_threads(threads)
    parts = [named] if isinstance(named, (str, Path, Model)) else list(named)
    models = [part for part in parts if isinstance(part, Model) or not (Path(part) / MANIFEST).is_file()]
    folders = list(
        dict.fromkeys(Path(part) for part in parts if not isinstance(part, Model) and (Path(part) / MANIFEST).is_file())
    )
    if not parts or len(models) + (model is not None) > 1:
        raise ConfigError("give one model, or artifacts, or one model and artifacts of it")
    manifests = {folder: read_manifest(folder) for folder in folders}
    chosen = models[0] if models else model
    if mmproj is not None and (chosen is None or isinstance(chosen, Model)):
        raise ConfigError(f"{mmproj}: an mmproj file belongs to a .gguf file of the text decoder: name that too")
    if rope_scaling is not None and chosen is None:
        raise ConfigError("artifacts keep the rope scaling that they have: leave out --rope-scaling, or name a model")
    if isinstance(chosen, Model):
        loaded = chosen if rope_scaling is None else chosen.scaled(rope_scaling)
    elif chosen is not None:
        # Artifacts that see none are of a text decoder.
        sees = images and (bool(models) or any(one.images is not None for one in manifests.values()))
        loaded = load(str(chosen), weights=weights, seed=seed, images=sees, mmproj=mmproj, rope_scaling=rope_scaling)
    else:
        folder = next((folder for folder in folders if manifests[folder].images is not None), folders[0])
        loaded = model_of(manifests[folder], folder)
    artifacts = []
    for folder, manifest in manifests.items():
        check_same(loaded, manifest, folder, weights=same_weights or chosen is None)
        options = Options.of_artifact(manifest)
        artifacts.append(
            Candidate(name=manifest.target, options=options, folder=folder, exported=True, threads=threads)
        )
    return Inputs(model=loaded if images else loaded.text(), artifacts=tuple(artifacts), compiles=bool(models))


def refuse_idle(verb: str, remedy: str, **options: bool) -> None:
    """Raise `ConfigError` if an option is given that does nothing, because artifacts alone are named."""
    if idle := ", ".join(f"--{name}" for name, is_given in options.items() if is_given):
        raise ConfigError(f"artifacts are {verb} as they stand: leave out {idle}, or name {remedy} to compile")


def to_compile(
    options: Mapping[str, Options], out: str | Path | None, *, overwrite: bool, threads: int | None
) -> list[Candidate]:
    """Candidates by their names, to be compiled into folders of `out` if there is one.

    Raises:
        ArtifactError: If a folder in `out` exists already or cannot be written.
    """
    candidates = []
    for name, each in options.items():
        folder = None
        if out is not None and each.target != REFERENCE:
            # What schemes are called may hold characters that folders should not.
            folder = Path(out) / re.sub(r"[^A-Za-z0-9_.-]+", "+", name.replace(" ", "-", 1))
            check_absent(folder, overwrite=overwrite)
            check_writable(next(parent for parent in folder.resolve().parents if parent.exists()))
        candidates.append(Candidate(name=name, options=each, folder=folder, overwrite=overwrite, threads=threads))
    return candidates


def disambiguate(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Add its folder to the name of every artifact whose name another candidate shares."""
    names = [candidate.name for candidate in candidates]
    return [
        dataclasses.replace(candidate, name=f"{candidate.name} ({candidate.folder})")
        if candidate.exported and names.count(candidate.name) > 1
        else candidate
        for candidate in candidates
    ]


def model_of(manifest: Manifest, folder: Path) -> Model:
    """Load the model that an artifact was made from, by the name in its manifest."""
    source, revision = manifest.source["name"], manifest.source["revision"]
    open_it = functools.partial(
        load,
        images=manifest.images is not None,
        adapter=manifest.source.get("adapter"),
        rope_scaling=manifest.source.get("rope_scaling"),
    )
    try:
        # What an adapter adds to the revision is checked against the model.
        if source == "random" and (match := _SEED.fullmatch(revision.partition(" + ")[0])):
            return open_it(manifest.model["name"], weights="random", seed=int(match[1]))
        return open_it(source, mmproj=manifest.source.get("mmproj"))
    except ConfigError as error:
        raise ConfigError(
            f"{folder} was made from {source!r}, which is not found ({error}): name it with --model"
        ) from None


def check_same(model: Model, manifest: Manifest, folder: Path, *, weights: bool = True) -> None:
    """Raise `ConfigError` if an artifact is not of the model, or, with `weights`, not of its very numbers."""
    # Of a model and an artifact of which only one sees images, the text decoders are compared.
    own = model.config if manifest.images is not None else model.config.text
    passed_over = {"name"} if (own.images is None) == (manifest.images is None) else {"name", "architecture", "images"}
    config: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(own)))
    theirs = dict(manifest.model)
    if differing := sorted(key for key in config.keys() - passed_over if config[key] != theirs.get(key)):
        raise ConfigError(
            f"{folder} is not of {model.config.name}: {', '.join(differing)} differ; name its model with --model"
        )
    if weights and model.revision != manifest.source["revision"]:
        raise ConfigError(
            f"{folder} was made from revision {manifest.source['revision']} of {manifest.source['name']}, the model "
            f"at hand is {model.revision}: export it again, or name its model with --model"
        )
