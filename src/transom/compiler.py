"""From a model to an artifact: trace, rewrite, lower, write."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from transom.backends.artifact import DECODE, Manifest, write_manifest
from transom.backends.folder import new_folder
from transom.errors import ContextLengthError, TargetError, TokenizerError
from transom.export.exporter import Request, exporter
from transom.export.ranges import TOKENS, activation_scales, trace_ranges
from transom.formats.number_format import float_format
from transom.formats.schemes import SCHEMES, scheme
from transom.graphs.graph import Graph
from transom.graphs.state import State, ring
from transom.graphs.threads import one_thread
from transom.graphs.trace import Task, trace
from transom.passes.base import Pass, Pipeline
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.guard_ranges import GuardRanges
from transom.passes.pipelines import pipeline
from transom.passes.quantize_activations import QuantizeActivations
from transom.passes.targets import TARGETS, Target
from transom.zoo.architectures import architecture
from transom.zoo.companions import write_companions
from transom.zoo.config import DecoderConfig
from transom.zoo.model import Model
from transom.zoo.prompt import make_prompt

CHUNK = 256
"""Default for the largest number of new tokens in one call."""

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
    return trace(
        functools.partial(architecture(config.architecture).build, config),
        model.weights,
        states=decoder_states(config),
        context=config.context,
        task=task,
        dtype=dtype,
    )


def decoder_states(config: DecoderConfig) -> tuple[State, ...]:
    """What a decoder keeps of every position: a ring of keys and one of values a layer."""
    return tuple(
        ring(f"cache.{index}.{kind}", layer=index, heads=layer.kv_heads, width=width)
        for index, layer in enumerate(config.layers)
        for kind, width in (("key", layer.key_width), ("value", layer.value_width))
    )


def guards(
    model: Model, traced: Graph, *, on_progress: OnProgress = lambda stage, done, total: None
) -> tuple[GuardRanges, ...]:
    """The passes that keep a model in range of the dtype that it was traced in; none unless that is float16.

    Ranges are traced in float32 on the shipped text, so all weights are read into memory.
    """
    if traced.outputs["logits"].meta["val"].dtype != torch.float16:
        return ()
    prompt = make_prompt(model, min(TOKENS, model.config.context), None)
    ranges = trace_ranges(
        model, prompt.ids, full=trace_model(model, dtype=torch.float32), half=traced, on_progress=on_progress
    )
    return (GuardRanges(ranges.largest()),)


def compile_model(
    model: Model,
    *,
    target: str = "onnxruntime",
    quant: str | None = None,
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
        quant: Name of a quantisation scheme; by default that of the codes beside the checkpoint, if there are some.
        context: Longest sequence, in tokens; by default the model's own.
        chunk: Largest number of new tokens in one call.
        dtype: What to compute in: "float32", "bfloat16" or "float16"; by default the target's first. In float16, what
            leaves its range on the shipped text is computed in float32: see `guards`.
        topology: For "xla": TPU topology to compile for ahead of time, such as "v5e:2x2".
        cpu: For "tvm": processor to make machine code for, such as "aarch64"; by default this machine's.
        before: Passes to run before the target's own, such as `AddTaps`.
        traced: The graph of `trace_model` for this model in this dtype, to save tracing again; it stays unchanged.
        out: Folder to write; it appears only when it is whole.
        overwrite: Whether to replace a folder of that name.
        on_progress: Told of every step.

    Raises:
        TargetError: If the target is unknown, lacks what is asked of it, or needs a library that is not installed.
        QuantizationError: If the scheme is unknown, or cannot hold a tensor.
        ContextLengthError: If the context is longer than the model's.
        ArtifactError: If `out` exists.
        UnsupportedOpsError: If the target cannot lower an operation.
        RangeError: If numbers leave float16's range where float32 islands do not help.
    """
    config = model.config
    quant = model.quant if quant is None else quant
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
        guarded = guards(model, traced, on_progress=on_progress)
        passes = Pipeline([*before, *guarded, *passes.passes[len(before) :]])
        done: list[Pass] = []

        def on_pass(current: Pass, graph: Graph) -> None:
            done.append(current)
            on_progress("passes", len(done), len(passes.passes))

        graph, records = passes.run(traced, on_pass=on_pass)
        if (number := scheme(quant).activations) is not None:
            prompt = make_prompt(model, min(TOKENS, context), None)
            scales = activation_scales(
                graph, prompt.ids, float_format(number), context=context, chunk=chunk, on_progress=on_progress
            )
            graph, last = Pipeline([QuantizeActivations(scales, number)]).run(graph)
            records = [*records, *last]
        total, written = graph.weight_bytes(), 0

        def on_bytes(count: int) -> None:
            nonlocal written
            written += count
            on_progress("weights", min(written, total), total)

        request = Request(
            target=target,
            context=context,
            chunk=chunk,
            quant=quant,
            dtype=dtype,
            topology=topology,
            cpu=cpu,
            on_bytes=on_bytes,
            on_program=lambda done, count: on_progress("programs", done, count),
        )
        # Weights are rounded in blocks that fit a core's cache; sharing such a block among threads costs far more.
        with one_thread():
            lowered = write(graph, folder, request)
        write_companions(model, folder)
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
                entries={DECODE: lowered.entry},
                details=lowered.details,
                tpu=lowered.tpu,
                stop_ids=model.generation.stop_ids,
                bos_id=model.tokenizer.first_id if model.tokenizer else None,
                passes=[record.to_json() for record in records],
                conversions=[
                    conversion.to_json()
                    for ran in done
                    if isinstance(ran, ConvertQuantized)
                    for conversion in ran.conversions
                ],
                not_done=[
                    *model.left_out,
                    *_without_template(model),
                    *(f"{record.name}: {reason}" for record in records for reason in record.skipped),
                    *lowered.not_done,
                ],
                libraries=versions(lowered.libraries),
            ),
        )
    return Artifact(folder=out, manifest=manifest)


def _without_template(model: Model) -> list[str]:
    """A line if the model's chat template cannot be used."""
    try:
        if model.tokenizer is not None:
            model.tokenizer.check_template()
    except TokenizerError as error:
        return [f"chat: {error}"]
    return []


def check_options(target: str, quant: str, dtype: str | None, **given: str | None) -> str:
    """The dtype to compute in, if the target has it and takes all that is asked of it; raises `TargetError` if not."""
    able = TARGETS[target]
    quant_scheme = scheme(quant)
    if lacking := sorted({spec.number for spec in quant_scheme.specs} - able.numbers):
        raise TargetError(
            f"the target {target!r} holds no {', '.join(lacking)}, which {quant!r} asks for: choose "
            f"{_schemes_for(able)}"
        )
    for spec in quant_scheme.specs:
        if reason := able.refuses(spec):
            raise TargetError(
                f"the target {target!r} holds no {spec.describe()} of {quant!r}, as {reason}: choose "
                f"{_schemes_for(able)}"
            )
    if quant_scheme.activations is not None and quant_scheme.activations not in able.activations:
        takers = [name for name, other in TARGETS.items() if quant_scheme.activations in other.activations]
        others = f"choose {' or '.join(takers)}" if takers else "no target does"
        raise TargetError(f"the target {target!r} rounds no activations, which {quant!r} asks for: {others}")
    if dtype is not None and dtype not in able.dtypes:
        raise TargetError(f"the target {target!r} computes in {' or '.join(able.dtypes)}, not in {dtype!r}")
    for option in sorted(name for name, value in given.items() if value is not None and name not in able.options):
        only = ", ".join(name for name, other in TARGETS.items() if option in other.options)
        raise TargetError(f"the target {target!r} takes no {option}: only {only} does")
    return dtype or able.dtypes[0]


def _schemes_for(target: Target) -> str:
    """Schemes that a target can hold, in words."""
    names = [
        name
        for name, quant_scheme in SCHEMES.items()
        if all(spec.number in target.numbers and not target.refuses(spec) for spec in quant_scheme.specs)
        and (quant_scheme.activations is None or quant_scheme.activations in target.activations)
    ]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of this package, of torch, and of some libraries."""
    names = ("transom", "torch", *libraries)
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
