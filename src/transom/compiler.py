"""From a model to an artifact: trace, rewrite, lower, write."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.backends.artifact import DECODE, Manifest, write_manifest
from transom.backends.folder import new_folder
from transom.errors import ContextLengthError, TokenizerError
from transom.export.exporter import Progress, encoder_exporter, exporter
from transom.export.options import Options
from transom.export.ranges import TOKENS, activation_scales, trace_encoder_ranges, trace_ranges
from transom.formats.number_format import float_format
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.threads import one_thread
from transom.passes.base import Pass, Pipeline, rewrites
from transom.passes.convert_quantized import Converted
from transom.passes.pipelines import Measure, pipeline
from transom.zoo.companions import write_companions
from transom.zoo.model import Model
from transom.zoo.prompt import make_prompt

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total): passes and programs are counted one by one, weights by bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A folder that a session can be opened from."""

    folder: Path
    manifest: Manifest


def measure_on_text(
    model: Model, options: Options, *, on_progress: OnProgress = lambda stage, done, total: None
) -> Measure:
    """How a target's passes measure a model: on the shipped text, with all weights in memory.

    Only float16 has a range that values leave, and only some schemes round activations: all else needs no measuring.
    """
    activations = scheme(options.quant).activations

    def ranges(graph: Graph) -> Mapping[str, float]:
        prompt = make_prompt(model, min(TOKENS, model.config.context), None)
        return trace_ranges(model, prompt.ids, half=graph, on_progress=on_progress).largest()

    def scales(graph: Graph) -> Mapping[str, float]:
        prompt = make_prompt(model, min(TOKENS, options.context), None)
        return activation_scales(
            graph,
            prompt.ids,
            float_format(str(activations)),
            context=options.context,
            chunk=options.chunk,
            on_progress=on_progress,
        )

    return Measure(ranges=ranges if options.dtype == "float16" else None, scales=scales if activations else None)


def measure_on_images(
    model: Model, options: Options, task: str, *, on_progress: OnProgress = lambda stage, done, total: None
) -> Measure:
    """How a target's passes measure an encoder: on images that are made for it, with its weights in memory.

    What activations would be rounded by is measured on text only, so those of an encoder stay as they are.
    """

    def ranges(graph: Graph) -> Mapping[str, float]:
        return trace_encoder_ranges(model, task, half=graph, on_progress=on_progress).largest()

    return Measure(ranges=ranges if options.dtype == "float16" else None)


def compile_model(
    model: Model,
    options: Options,
    *,
    before: Sequence[Pass] = (),
    traced: Graph | None = None,
    out: Path,
    overwrite: bool = False,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Artifact:
    """Lower a model and write the artifact.

    Args:
        model: What to lower.
        options: What to lower it to; see `Options.of`. In float16, what leaves its range on the shipped text, or in an
            encoder on images, is computed in float32: see `measure_on_text` and `measure_on_images`.
        before: Passes to run before the target's own, such as `AddTaps`.
        traced: A decode graph in this dtype to lower in place of the model's own; it stays unchanged.
        out: Folder to write; it appears only when it is whole.
        overwrite: Whether to replace a folder of that name.
        on_progress: Told of every step.

    Raises:
        TargetError: If the target is unknown, or needs a library that is not installed.
        QuantizationError: If the scheme cannot hold a tensor.
        ArtifactError: If `out` exists.
        UnsupportedOpsError: If the target cannot lower an operation.
        ContextLengthError: If the chunk does not hold an image.
        RangeError: If numbers leave float16's range where float32 islands do not help.
    """
    config, write = model.config, exporter(options.target)
    if config.images is not None and options.chunk < config.images.soft_tokens:
        raise ContextLengthError(
            f"calls of {options.chunk} tokens cannot hold the {config.images.soft_tokens} of an image, which is not to "
            f"be cut: export with --chunk {config.images.soft_tokens} or more, or without images (--no-vision)"
        )
    measure = measure_on_text(model, options, on_progress=on_progress)
    listed = pipeline(options.target, chunk=options.chunk, scheme=scheme(options.quant), measure=measure)
    passes = Pipeline([*before, *listed.passes])
    dtype = getattr(torch, options.dtype)
    with new_folder(out, overwrite=overwrite) as folder:
        on_progress("trace", 0, 1)
        if traced is None:
            traced = model.trace(dtype=dtype)
        on_progress("trace", 1, 1)
        done = 0

        def on_pass(current: Pass, graph: Graph) -> None:
            nonlocal done
            done += 1
            on_progress("passes", done, len(passes.passes))

        graph, records = passes.run(traced, on_pass=on_pass)
        total, written = graph.weight_bytes(), 0

        def on_bytes(count: int) -> None:
            nonlocal written
            written += count
            on_progress("weights", min(written, total), total)

        progress = Progress(on_bytes=on_bytes, on_program=lambda done, count: on_progress("programs", done, count))
        encoders: dict[str, Graph] = {}
        all_records, unmeasured = list(records), []
        for name in config.encoders:
            measured = measure_on_images(model, options, name, on_progress=on_progress)
            its_passes = pipeline(options.target, chunk=options.chunk, scheme=scheme(options.quant), measure=measured)
            traced_encoder = model.trace(task=name, dtype=dtype)
            encoders[name], more = Pipeline([*before, *its_passes.passes]).run(traced_encoder)
            total += encoders[name].weight_bytes()
            all_records += [dataclasses.replace(record, name=f"{name}: {record.name}") for record in more]
            unmeasured += [f"{name}: its activations stay, as scales are measured on text"] if measure.scales else []
        if encoders and measure.ranges is not None:
            unmeasured.append(f"{DECODE}: its ranges are measured on text, not with soft tokens of images")
        # Weights are rounded in blocks that fit a core's cache; sharing such a block among threads costs far more.
        with one_thread():
            lowered = write(graph, folder, options, progress)
            encoded = {
                name: encoder_exporter(options.target)(encoder, folder, options, progress)
                for name, encoder in encoders.items()
            }
        write_companions(model, folder)
        manifest = write_manifest(
            folder,
            Manifest(
                target=options.target,
                model=dataclasses.asdict(config),
                source={
                    "name": model.source,
                    "revision": model.revision,
                    **({} if model.mmproj is None else {"mmproj": model.mmproj}),
                    **({} if model.adapter is None else {"adapter": model.adapter}),
                    **({} if model.rope_scaling is None else {"rope_scaling": model.rope_scaling}),
                },
                quantization=options.quant,
                dtype=options.dtype,
                context=options.context,
                chunk=options.chunk,
                vocab_size=config.vocab_size,
                entries={DECODE: lowered.entry, **{name: one.entry for name, one in encoded.items()}},
                images=config.images,
                details={**lowered.details, **{name: one.details for name, one in encoded.items() if one.details}},
                tpu=_joined([lowered.tpu, *(one.tpu for one in encoded.values())]),
                stop_ids=model.generation.stop_ids,
                bos_id=model.tokenizer.first_id if model.tokenizer else None,
                passes=[record.to_json() for record in all_records],
                conversions=[
                    conversion.to_json()
                    for converted in rewrites(all_records, Converted)
                    for conversion in converted.conversions
                ],
                not_done=[
                    *model.left_out,
                    *_without_template(model),
                    *(f"{record.name}: {reason}" for record in all_records for reason in record.skipped),
                    *unmeasured,
                    *lowered.not_done,
                ],
                libraries=versions(lowered.libraries),
            ),
        )
    return Artifact(folder=out, manifest=manifest)


def _joined(reports: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """One report of a TPU's compiler on the programs of several graphs; None if it was not asked."""
    programs: dict[str, Any] = {}
    given = [report for report in reports if report is not None]
    for report in given:
        programs |= report["programs"]
    return {**given[0], "programs": programs} if given else None


def _without_template(model: Model) -> list[str]:
    """A line if the model's chat template cannot be used."""
    try:
        if model.tokenizer is not None:
            model.tokenizer.check_template()
    except TokenizerError as error:
        return [f"chat: {error}"]
    return []


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of this package, of torch, and of some libraries."""
    names = ("transom", "torch", *libraries)
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
