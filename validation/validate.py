"""Validation: the same prompts through every target, held against the oracle."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import itertools
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transom.backends.artifact import check_absent
from transom.graphs.errors import ConfigError, ContextLengthError
from transom.graphs.schemes import scheme
from transom.validation.candidates import (
    REFERENCE,
    Candidate,
    OnProgress,
    Opener,
    Settings,
    check_targets,
    installed_targets,
)
from transom.validation.certificate import write_certificate
from transom.validation.inputs import Inputs, read_inputs
from transom.validation.layers import compare_layers
from transom.validation.lengths import default_chunk, default_context, schedule
from transom.validation.measure import measure
from transom.validation.oracle import Oracle, Reading
from transom.validation.prompt import Prompt, make_prompt
from transom.validation.result import TargetResult, Validation
from transom.validation.tolerances import tolerance
from transom.zoo.config import DecoderConfig
from transom.zoo.model import Model

LIBRARIES = ("transom", "torch", "numpy", "onnxruntime", "jax", "apache-tvm")


def validate_sources(
    model_or_dirs: str | Path | Model | Sequence[str | Path | Model],
    *,
    targets: Sequence[str] | None = None,
    quant: str = "none",
    dtype: str | None = None,
    context: int | None = None,
    chunk: int | None = None,
    text: str | Path | None = None,
    out: str | Path | None = None,
    model: str | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    threads: int | None = None,
    layers: bool = False,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Validation:
    """Hold targets against the plain module in float32.

    Every artifact that is kept gets a certificate, `validation.json`.

    Args:
        model_or_dirs: A model (whatever `transom.load` takes, or a loaded one), which is compiled for every target;
            exported artifacts of that model; or both.
        targets: Names to compile for; "reference" interprets the rewritten graph. By default, with a model, all whose
            libraries are installed; with artifacts alone, none.
        quant: Scheme to compile with.
        dtype: What to compute in; by default each target's first.
        context: Longest sequence to compile for; by default enough for the longest prompt.
        chunk: Most new tokens in one call; by default one and a half windows.
        text: File to read; by default a text of this package, or random tokens for a model without a tokenizer.
        out: Folder to keep the artifacts in, one a target.
        model: Where the artifacts' model is, if not where their manifests say.
        weights: "random" draws the model's weights from `seed`.
        seed: Of random weights.
        threads: Threads of the runtimes.
        layers: Also compare the values after every step of every layer; compiles each target a second time.
        on_progress: Called with (step, done, total).

    Raises:
        ConfigError: If nothing, or more than one model, is given, or artifacts are not of the model.
        TargetError: If a target is unknown, or was named and its library is missing.
        ArtifactError: If an artifact is damaged, or a folder cannot be written.
        ContextLengthError: If the context is too short or longer than the model's.
        TokenizerError: If the text cannot be read.
    """
    scheme(quant)
    if targets is not None:
        check_targets(list(targets))
    inputs = read_inputs(model_or_dirs, model=model, weights=weights, seed=seed, threads=threads)
    config = inputs.model.config
    names, not_run = _names(inputs, targets, dtype)
    compiled = _settings(config, quant=quant, dtype=dtype, context=context, chunk=chunk, threads=threads)
    candidates = _told_apart([*inputs.artifacts, *_compiled(names, compiled, None if out is None else Path(out))])
    if not candidates:
        raise ConfigError("nothing to validate: name a target, or install the library of one")
    # What can be refused at once should not wait for the oracle.
    for candidate in candidates:
        tolerance(candidate.target, dtype=candidate.dtype, quant=candidate.settings.quant)
    longest = max(
        schedule(window=config.window, context=candidate.settings.context, caches=()).longest
        for candidate in candidates
    )
    prompt = make_prompt(inputs.model, longest, None if text is None else Path(text), seed)
    blank = Validation(
        model=config.name,
        source={"name": inputs.model.source, "revision": inputs.model.revision},
        oracle="the model file in eager float32 PyTorch, without caches; of quantised targets, with the numbers that "
        "their codes mean",
        prompt={"source": prompt.source, "tokens": len(prompt.ids), "sha256": prompt.sha256},
        targets={},
        not_run=not_run,
        versions=_versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    results = _run(inputs.model, candidates, prompt, layers, blank, on_progress)
    # In the order in which they were asked for; they ran scheme by scheme.
    return dataclasses.replace(blank, targets={c.name: results[c.name] for c in candidates})


def _run(
    model: Model,
    candidates: Sequence[Candidate],
    prompt: Prompt,
    layers: bool,
    blank: Validation,
    on_progress: OnProgress,
) -> Mapping[str, TargetResult]:
    results = {}
    opener = Opener(model)
    unquantized: Reading | None = None
    by_quant = sorted(candidates, key=lambda candidate: candidate.settings.quant != "none")
    for quant, group in itertools.groupby(by_quant, key=lambda candidate: candidate.settings.quant):
        if quant != "none" and unquantized is None:
            unquantized = Oracle(model, "none", prompt.ids, opener.traced()).text
        on_progress("oracle", 0, 1)
        oracle = Oracle(model, quant, prompt.ids, opener.traced())
        on_progress("oracle", 1, 1)
        if quant == "none":
            unquantized = oracle.text
        beside = None if quant == "none" else unquantized
        for candidate in group:
            result = _validate_one(opener, candidate, prompt, oracle, beside, on_progress)
            if layers and candidate.target != REFERENCE:
                found = compare_layers(candidate, opener, prompt.ids, on_progress)
                result = dataclasses.replace(result, layers=found)
            results[candidate.name] = result
            if candidate.folder is not None:
                certify(candidate.folder, blank, candidate.name, result)
    return results


def _validate_one(
    opener: Opener,
    candidate: Candidate,
    prompt: Prompt,
    oracle: Oracle,
    unquantized: Reading | None,
    on_progress: OnProgress,
) -> TargetResult:
    name = candidate.name
    with opener.open(candidate, lambda stage, done, total: on_progress(f"{name}: {stage}", done, total)) as session:
        return measure(
            session,
            candidate,
            opener.model.config,
            oracle,
            prompt.ids,
            unquantized=unquantized,
            on_progress=lambda done, total: on_progress(name, done, total),
        )


def certify(folder: Path, blank: Validation, name: str, result: TargetResult) -> None:
    """Write the certificate of one artifact.

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    content: dict[str, Any] = dataclasses.replace(blank, targets={name: result}, not_run={}).to_json()
    (numbers,) = content.pop("targets").values()
    del content["not_run"]
    write_certificate(folder, content | {"result": numbers})


def _names(inputs: Inputs, targets: Sequence[str] | None, dtype: str | None) -> tuple[list[str], dict[str, str]]:
    if targets is not None:
        return list(targets), {}
    return installed_targets(dtype) if inputs.compiles else ([], {})


def _settings(
    config: DecoderConfig,
    *,
    quant: str,
    dtype: str | None,
    context: int | None,
    chunk: int | None,
    threads: int | None,
) -> Settings:
    context = default_context(config.window, config.context) if context is None else context
    if not 1 <= context <= config.context:
        raise ContextLengthError(
            f"a context of {context} tokens was asked for, {config.name} was made for 1 to {config.context}"
        )
    chunk = default_chunk(config.window, context) if chunk is None else min(chunk, context)
    return Settings(quant=quant, dtype=dtype, context=context, chunk=chunk, threads=threads)


def _compiled(names: Sequence[str], settings: Settings, out: Path | None) -> list[Candidate]:
    found = []
    for name in names:
        folder = None if out is None or name == REFERENCE else out / name
        if folder is not None:
            check_absent(folder)
        found.append(Candidate(name=name, target=name, settings=settings, folder=folder))
    return found


def _told_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Artifacts carry their folders in their names where their targets would not tell."""
    names = [candidate.name for candidate in candidates]
    return [
        dataclasses.replace(candidate, name=f"{candidate.name} ({candidate.folder})")
        if candidate.exported and names.count(candidate.name) > 1
        else candidate
        for candidate in candidates
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
