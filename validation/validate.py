"""Validation: the same prompts through every target, compared with the oracle."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transom.backends.folder import MANIFEST
from transom.compiler import versions
from transom.errors import ConfigError, TransomError
from transom.export.options import Options
from transom.formats.schemes import scheme
from transom.validation.candidates import (
    REFERENCE,
    REFERENCE_PIPELINE,
    Candidate,
    OnProgress,
    Opener,
    check_targets,
    disambiguate,
    installed_targets,
    read_inputs,
    refuse_idle,
    to_compile,
)
from transom.validation.certificate import check_writable, write_certificate
from transom.validation.images import ImageOracle, Picture, pictures
from transom.validation.layers import compare_layers
from transom.validation.lengths import default_chunk, default_context, text_length
from transom.validation.oracle import Oracle, Reading
from transom.validation.result import TargetResult, Validation
from transom.validation.target import add_images, failed_target, in_a_line, validate_target
from transom.validation.tolerances import quantization_limit, tolerance
from transom.zoo.model import Model
from transom.zoo.prompt import Prompt, make_prompt

LIBRARIES = ("numpy", "onnxruntime", "jax", "apache-tvm")


def validate_sources(
    model_or_dirs: str | Path | Model | Sequence[str | Path | Model],
    *,
    targets: Sequence[str] | None = None,
    quant: str | None = None,
    dtype: str | None = None,
    context: int | None = None,
    chunk: int | None = None,
    text: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    model: str | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    threads: int | None = None,
    layers: bool = False,
    vision: bool = True,
    images: Sequence[str | Path] = (),
    mmproj: str | Path | None = None,
    rope_scaling: str | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Validation:
    """Hold targets against the plain module in float32.

    Every artifact that is kept gets a certificate, `validation.json`. What can be known to be wrong is raised before
    the oracle runs; a target that cannot be run after that fails alone.

    Args:
        model_or_dirs: A model (whatever `transom.load` takes, or a loaded one), which is compiled for every target;
            exported artifacts of that model; or both.
        targets: Names to compile for; "reference" interprets the rewritten graph. By default, with a model, all whose
            libraries are installed; with artifacts alone, none.
        quant: Scheme to compile with; by default that of the codes beside the checkpoint, if there are some.
        dtype: What to compute in; by default each target's first.
        context: Longest sequence to compile for; by default enough for the longest prompt.
        chunk: Most new tokens in one call; by default one and a half windows.
        text: File to read; by default a text of this package, or random tokens for a model without a tokenizer.
        out: Folder to keep the artifacts in, one a target.
        overwrite: Whether artifacts in `out` may be replaced.
        model: Where the artifacts' model is, if not where their manifests say.
        weights: "random" draws the model's weights from `seed`.
        seed: Of random weights.
        threads: Threads of the runtimes.
        layers: Also compare the values after every step of every layer; compiles each target a second time.
        vision: Whether to validate the images of a model that sees them, too: its encoder, and prompts of text and
            images. Encoding an image of 896 x 896 in the oracle takes a minute or more of a CPU.
        images: Files of images to show; by default images that are drawn from `seed`, one for an encoder of large
            images and three else.
        mmproj: The encoder of images of a .gguf file, a file of its own.
        rope_scaling: By what the model's positions are stretched; see `Model.scaled`.
        on_progress: Called with (step, done, total).

    Raises:
        ImageError: If an image cannot be read.
        ConfigError: If nothing, or more than one model, is given, artifacts are not of the model, or an option would
            do nothing.
        TargetError: If a target is unknown, or was named and its library is missing or it cannot hold the scheme.
        ArtifactError: If an artifact is damaged, or a folder cannot be written.
        ContextLengthError: If the context is too short or longer than the model's.
        TokenizerError: If the text cannot be read.
    """
    scheme(quant or "none")
    if targets is not None:
        check_targets(list(targets), quant=quant or "none", dtype=dtype)
    if overwrite and out is None:
        raise ConfigError("nothing is kept that could replace anything: leave out --overwrite, or give --out")
    if not vision and (images or mmproj is not None):
        raise ConfigError("images are left out: drop --no-vision, or --image and --mmproj")
    inputs = read_inputs(
        model_or_dirs,
        model=model,
        weights=weights,
        seed=seed,
        threads=threads,
        images=vision,
        mmproj=None if mmproj is None else Path(mmproj),
        rope_scaling=rope_scaling,
    )
    config, not_run = inputs.model.config, dict[str, str]()
    if not inputs.compiles and targets is None:
        refuse_idle(
            "validated",
            "a model",
            quant=quant is not None,
            dtype=dtype is not None,
            context=context is not None,
            chunk=chunk is not None,
            out=out is not None,
            weights=weights != "checkpoint" and model is None,
            # It also draws the text of a model without a tokenizer.
            seed=seed != 0 and model is None and inputs.model.tokenizer is not None,
        )
    quant = inputs.model.quant if quant is None else quant
    if targets is None:
        targets, not_run = installed_targets(quant=quant, dtype=dtype) if inputs.compiles else ([], {})
    options = {name: _options(inputs.model, name, quant, dtype, context, chunk) for name in targets}
    compiled = to_compile(options, out, overwrite=overwrite, threads=threads)
    candidates = disambiguate([*inputs.artifacts, *compiled])
    if not candidates:
        raise ConfigError("nothing to validate: name a target, or install the library of one")
    # What can be refused at once should not wait for the oracle.
    for candidate in candidates:
        tolerance(candidate.target, dtype=candidate.options.dtype, quant=candidate.options.quant)
        quantization_limit(candidate.options.quant)
    longest = max(
        text_length(window=config.longest_window, context=part.options.context, chunk=part.options.chunk)
        for part in candidates
    )
    shown: list[Picture] = []
    if config.images is not None:
        shown = pictures(config.images, [Path(image) for image in images], seed)
    elif images:
        raise ConfigError(f"{config.name} sees no images: leave out --image")
    prompt = make_prompt(inputs.model, longest, None if text is None else Path(text), seed)
    opener = Opener(inputs.model)
    for candidate in inputs.artifacts:
        _check_artifact(opener, candidate)
    blank = Validation(
        model=config.name,
        source={"name": inputs.model.source, "revision": inputs.model.revision},
        oracle="the model file in eager float32 PyTorch, without caches; of quantised targets, with the numbers that "
        "their codes mean",
        prompt={"source": prompt.source, "tokens": len(prompt.ids), "sha256": prompt.sha256},
        images=tuple(picture.to_json() for picture in shown),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(LIBRARIES),
        not_run=not_run,
        targets={},
    )
    results = _run(opener, candidates, prompt, shown, layers, blank, on_progress)
    # In the order in which they were asked for; they ran scheme by scheme.
    return dataclasses.replace(blank, targets={c.name: results[c.name] for c in candidates})


def _check_artifact(opener: Opener, candidate: Candidate) -> None:
    """Raise what is wrong with an artifact's folder."""
    assert candidate.folder is not None
    check_writable(candidate.folder)
    try:
        with opener.open(candidate, lambda stage, done, total: None):
            pass
    except TransomError:
        raise
    except Exception:
        # Not a refusal of ours: it will be raised again, and be that target's failure.
        return


def _run(
    opener: Opener,
    candidates: Sequence[Candidate],
    prompt: Prompt,
    shown: Sequence[Picture],
    layers: bool,
    blank: Validation,
    on_progress: OnProgress,
) -> Mapping[str, TargetResult]:
    results, model = {}, opener.model
    unquantized: Reading | None = None
    by_quant = sorted(candidates, key=lambda candidate: (candidate.options.quant != "none", candidate.options.quant))
    for quant, group in itertools.groupby(by_quant, key=lambda candidate: candidate.options.quant):
        if quant != "none" and unquantized is None:
            unquantized = Oracle(model.text(), "none", prompt.ids).text
        on_progress("oracle", 0, 1)
        oracle = Oracle(model, quant, prompt.ids)
        on_progress("oracle", 1, 1)
        if quant == "none":
            unquantized = oracle.text
        beside = None if quant == "none" else unquantized
        seen = _see(opener, oracle, prompt, shown, on_progress)
        for candidate in group:
            result = _validate_one(opener, candidate, prompt, oracle, beside, seen, layers, on_progress)
            results[candidate.name] = result
            if candidate.folder is not None and (candidate.folder / MANIFEST).is_file():
                certify(candidate.folder, blank, candidate.name, result)
    return results


def _see(
    opener: Opener, oracle: Oracle, prompt: Prompt, shown: Sequence[Picture], on_progress: OnProgress
) -> ImageOracle | None:
    """The oracle's soft tokens; None if there is nothing to show."""
    images = opener.model.config.images
    if images is None or not shown:
        return None
    return ImageOracle(
        oracle, images, shown, prompt.ids, lambda done, total: on_progress("oracle: images", done, total)
    )


def _validate_one(
    opener: Opener,
    candidate: Candidate,
    prompt: Prompt,
    oracle: Oracle,
    unquantized: Reading | None,
    seen: ImageOracle | None,
    layers: bool,
    on_progress: OnProgress,
) -> TargetResult:
    name, config = candidate.name, opener.model.config
    try:
        with opener.open(candidate, lambda stage, done, total: on_progress(f"{name}: {stage}", done, total)) as session:
            result = validate_target(
                session,
                candidate,
                config,
                oracle,
                prompt.ids,
                unquantized=unquantized,
                on_progress=lambda done, total: on_progress(name, done, total),
            )
            # An artifact may be of the text decoder alone.
            if seen is not None and session.images is not None:
                result = add_images(
                    result,
                    session,
                    candidate,
                    config,
                    seen,
                    lambda stage, done, total: on_progress(f"{name}: {stage}", done, total),
                )
    except Exception as error:
        # Runtimes raise what they like, and what the other targets give must not be lost.
        return failed_target(candidate, config, error)
    if not layers or candidate.target == REFERENCE:
        return result
    try:
        return dataclasses.replace(
            result, layers=compare_layers(candidate, Opener(opener.model.text()), prompt.ids, on_progress)
        )
    except Exception as error:
        line = f"could not compare its layers: {in_a_line(error)}"
        return dataclasses.replace(result, failures=(*result.failures, line))


def certify(folder: Path, blank: Validation, name: str, result: TargetResult) -> None:
    """Write the certificate of one artifact.

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    content: dict[str, Any] = dataclasses.replace(blank, targets={name: result}, not_run={}).to_json()
    (numbers,) = content.pop("targets").values()
    del content["not_run"]
    write_certificate(folder, content | {"result": numbers})


def _options(
    model: Model, target: str, quant: str, dtype: str | None, context: int | None, chunk: int | None
) -> Options:
    window, most = model.config.longest_window, model.config.context
    image = 0 if model.config.images is None else model.config.images.soft_tokens
    context = default_context(window, most, image) if context is None else context
    chunk = default_chunk(window, context, image) if chunk is None else chunk
    if target != REFERENCE:
        return Options.of(model, target=target, quant=quant, context=context, chunk=chunk, dtype=dtype)
    # The passes that all targets share, and any dtype.
    options = Options.of(model, target=REFERENCE_PIPELINE, quant=quant, context=context, chunk=chunk)
    return dataclasses.replace(options, target=REFERENCE, dtype=dtype or options.dtype)
