"""From a model to an artifact: trace, rewrite, lower, write."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.backends.artifact import Manifest, new_folder, write_manifest
from transom.backends.reference.session import cache_records, tap_records
from transom.export.exporter import Request, exporter
from transom.graphs.errors import ContextLengthError, TargetError
from transom.graphs.graph import Graph
from transom.graphs.schemes import scheme
from transom.graphs.trace import Task, trace
from transom.passes.base import Pass, Pipeline
from transom.passes.pipelines import pipeline
from transom.passes.targets import TARGETS
from transom.zoo.architectures import ARCHITECTURES
from transom.zoo.model import Model

CHUNK = 256
"""Default for the largest number of new tokens in one call."""

GEMMA_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
"""What Gemma 3's makers sample with, for sources that do not say."""

GENERATION = "generation_config.json"

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total): passes and programs are counted one by one, weights by bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A folder that a session can be opened from."""

    folder: Path
    manifest: Manifest


def trace_model(model: Model, *, task: Task = "decode", dtype: torch.dtype = torch.float32) -> Graph:
    """Trace a model of the zoo; see `graphs.trace.trace`."""
    config = model.config
    return trace(lambda: ARCHITECTURES[config.architecture](config), config, model.weights, task=task, dtype=dtype)


def compile_model(
    model: Model,
    *,
    target: str = "onnxruntime",
    quant: str = "none",
    context: int | None = None,
    chunk: int = CHUNK,
    dtype: str | None = None,
    topology: str | None = None,
    cpu: str | None = None,
    before: Sequence[Pass] = (),
    traced: Graph | None = None,
    out: Path,
    overwrite: bool = False,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Artifact:
    """Lower a model and write the artifact.

    Args:
        model: What to lower.
        target: A key of `passes.targets.TARGETS`.
        quant: Name of a quantisation scheme.
        context: Longest sequence, in tokens; by default the model's own.
        chunk: Largest number of new tokens in one call.
        dtype: What to compute in: "float32" or "bfloat16"; by default the target's first.
        topology: For "xla": TPU topology to compile for ahead of time, such as "v5e:2x2".
        cpu: For "tvm": processor to make machine code for, such as "aarch64"; by default this machine's.
        before: Passes to run before the target's own, such as `AddTaps`.
        traced: What `trace_model` made of this model in this dtype, to save doing it again; left as it is.
        out: Folder to write; it appears only when it is whole.
        overwrite: Whether to replace a folder of that name.
        on_progress: Told of every step.

    Raises:
        TargetError: If the target is unknown, lacks what is asked of it, or needs a library that is not installed.
        QuantizationError: If the scheme is unknown, or cannot hold a tensor.
        ContextLengthError: If the context is longer than the model's.
        ArtifactError: If `out` exists.
        UnsupportedOpsError: If the target cannot lower an operation.
    """
    config = model.config
    context = config.context if context is None else context
    if not 1 <= context <= config.context:
        raise ContextLengthError(
            f"a context of {context} tokens was asked for, {config.name} was made for 1 to {config.context}"
        )
    chunk = min(chunk, context)
    passes = pipeline(target, chunk=chunk, scheme=scheme(quant))
    passes, write = Pipeline([*before, *passes.passes]), exporter(target)
    dtype = check_options(target, quant, dtype, topology=topology, cpu=cpu)
    with new_folder(out, overwrite=overwrite) as folder:
        on_progress("trace", 0, 1)
        if traced is None:
            traced = trace_model(model, dtype=getattr(torch, dtype))
        on_progress("trace", 1, 1)
        done: list[Pass] = []

        def on_pass(current: Pass, graph: Graph) -> None:
            done.append(current)
            on_progress("passes", len(done), len(passes.passes))

        graph, records = passes.run(traced, on_pass=on_pass)
        total, written = graph.weight_bytes(), 0

        def on_bytes(count: int) -> None:
            nonlocal written
            written += count
            on_progress("weights", min(written, total), total)

        request = Request(
            target=target,
            context=context,
            chunk=chunk,
            topology=topology,
            cpu=cpu,
            on_bytes=on_bytes,
            on_program=lambda done, count: on_progress("programs", done, count),
        )
        with _one_thread():
            lowered = write(graph, folder, request)
        _write_companions(model, folder)
        manifest = write_manifest(
            folder,
            Manifest(
                target=target,
                model=dataclasses.asdict(config),
                source={"name": model.source, "revision": model.revision},
                quantization=quant,
                dtype=dtype,
                context=context,
                chunk=chunk,
                vocab_size=config.vocab_size,
                caches=lowered.caches or cache_records(graph),
                taps=tap_records(graph),
                payload=lowered.payload,
                details=lowered.details,
                tpu=lowered.tpu,
                stop_ids=model.tokenizer.stop_ids if model.tokenizer else (),
                bos_id=model.tokenizer.bos_id if model.tokenizer else None,
                passes=[record.to_json() for record in records],
                not_done=[
                    *(f"{record.name}: {reason}" for record in records for reason in record.skipped),
                    *lowered.not_done,
                ],
                libraries=versions(lowered.libraries),
            ),
        )
    return Artifact(folder=out, manifest=manifest)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Weights are rounded in blocks that fit a core's cache; sharing such a block among threads costs far more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_companions(model: Model, folder: Path) -> None:
    generation: dict[str, Any] = dict(GEMMA_SAMPLING)
    source = Path(model.source) / GENERATION
    if source.is_file():
        with contextlib.suppress(ValueError):
            generation = json.loads(source.read_text())
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
        generation |= {"bos_token_id": model.tokenizer.bos_id, "eos_token_id": list(model.tokenizer.stop_ids)}
    (folder / GENERATION).write_text(json.dumps(generation, indent=1) + "\n")


def check_options(target: str, quant: str, dtype: str | None, **given: str | None) -> str:
    """The dtype to compute in, if the target has it and takes all that is asked of it; raises `TargetError` if not."""
    able = TARGETS[target]
    made = scheme(quant)
    if lacking := sorted({spec.number for spec in made.specs} - able.numbers):
        raise TargetError(f"the target {target!r} holds no {', '.join(lacking)}, which {quant!r} asks for: choose int8")
    if made.activations is not None and made.activations not in able.activations:
        takers = [name for name, other in TARGETS.items() if made.activations in other.activations]
        others = f"choose {' or '.join(takers)}" if takers else "no target does"
        raise TargetError(f"the target {target!r} rounds no activations, which {quant!r} asks for: {others}")
    if dtype is not None and dtype not in able.dtypes:
        raise TargetError(f"the target {target!r} computes in {' or '.join(able.dtypes)}, not in {dtype!r}")
    for option in sorted(name for name, value in given.items() if value is not None and name not in able.options):
        takers = ", ".join(name for name, other in TARGETS.items() if option in other.options)
        raise TargetError(f"the target {target!r} takes no {option}: only {takers} does")
    return dtype or able.dtypes[0]


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of this package, of torch, and of some libraries."""
    names = ("transom", "torch", *libraries)
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
