"""Evaluation: one text through every scheme, and what each costs in bytes and time."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from transom.compiler import versions
from transom.errors import ConfigError, TargetError, TransomError
from transom.export.options import CHUNK, Options, check_context
from transom.formats.schemes import scheme
from transom.passes.targets import TARGETS
from transom.validation.candidates import (
    OnProgress,
    Opener,
    check_targets,
    disambiguate,
    read_inputs,
    refuse_idle,
    to_compile,
)
from transom.validation.evaluation.result import Evaluation, Row
from transom.validation.evaluation.rows import evaluate_all, reason
from transom.validation.evaluation.speed import REPEATS, processor, split
from transom.validation.evaluation.text import read_sequences
from transom.validation.validate import LIBRARIES
from transom.zoo.model import Model

SCHEMES = ("none", "int8", "int4")
TARGETS_BY_DEFAULT = ("onnxruntime",)
DECODE_TOKENS = 64


def evaluate_sources(
    model_or_dirs: str | Path | Model | Sequence[str | Path | Model],
    *,
    text: str | Path,
    schemes: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    dtype: str | None = None,
    length: int | None = None,
    windows: int = 1,
    context: int | None = None,
    chunk: int | None = None,
    decode_tokens: int = DECODE_TOKENS,
    out: str | Path | None = None,
    overwrite: bool = False,
    model: str | Path | Model | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    threads: int | None = None,
    rope_scaling: str | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Evaluation:
    """Weigh schemes: perplexity, KL and top-1 agreement against bytes and tokens a second.

    All are compared with the unquantised model: the plain module in float32 with the checkpoint's own numbers. Whatever
    a checkpoint of bfloat16 or of a GGUF file says, float32 holds exactly. Schemes are compiled, measured and removed
    one after another; one that cannot be run is told apart from the others, unless it is the only one.

    Args:
        model_or_dirs: A model (whatever `transom.load` takes, or a loaded one), which is compiled for every scheme and
            target; exported artifacts, which are taken as they stand; or both.
        text: File to read, in UTF-8.
        schemes: Names of schemes; by default none, int8 and int4.
        targets: Names of targets; by default "onnxruntime".
        dtype: What to compute in; by default each target's first.
        length: Tokens of a sequence; by default as many as the text has, up to 2,048.
        windows: Sequences of that length, which do not overlap.
        context: Longest sequence to compile for; by default enough for `length`.
        chunk: Most new tokens in one call; by default 256.
        decode_tokens: Tokens to decode one by one when decoding is timed; at most half of a sequence.
        out: Folder to keep the artifacts in, as TARGET-SCHEME.
        overwrite: Whether artifacts in `out` may be replaced.
        model: The unquantised model, if it is not to be compiled and not where the artifacts' manifests say. Artifacts
            may then have other weights of the same shapes, such as those that were trained on from it.
        weights: "random" draws the model's weights from `seed`.
        seed: Of random weights.
        threads: Threads of the runtimes.
        rope_scaling: By what the model's positions are stretched; see `Model.scaled`.
        on_progress: Called with (step, done, total).

    Raises:
        ConfigError: If nothing, or more than one model, is given, artifacts are not of the model, or an option would
            do nothing.
        QuantizationError: If a scheme is unknown, or the only one and cannot hold a tensor.
        TargetError: If a target is unknown, or nothing could be run.
        ArtifactError: If an artifact is damaged, or a folder cannot be written.
        ContextLengthError: If sequences do not fit.
        TokenizerError: If the model has no tokenizer, or the text cannot be read or is too short.
    """
    _check_names("scheme", schemes, scheme)
    _check_names("target", targets, _check_target)
    if windows < 1 or decode_tokens < 1:
        raise ConfigError("--windows and --decode-tokens must be 1 or more")
    if overwrite and out is None:
        raise ConfigError("nothing is kept that could replace anything: leave out --overwrite, or give --out")
    inputs = read_inputs(
        model_or_dirs,
        model=model,
        weights=weights,
        seed=seed,
        threads=threads,
        same_weights=False,
        rope_scaling=rope_scaling,
    )
    config, compiles = inputs.model.config, inputs.compiles or schemes is not None or targets is not None
    if not compiles:
        refuse_idle(
            "evaluated",
            "schemes",
            context=context is not None,
            chunk=chunk is not None,
            out=out is not None,
            dtype=dtype is not None,
            weights=weights != "checkpoint" and model is None,
            seed=seed != 0 and model is None,
        )
    check_context(config, context)
    most = min(context or config.context, *(part.options.context for part in inputs.artifacts), config.context)
    read = read_sequences(inputs.model, Path(text), length=length, windows=windows, most=most)
    options: dict[str, Options] = {}
    if compiles:
        # A power of two, as caches grow to.
        context = context or min(config.context, 1 << (read.length - 1).bit_length())
        for target, quant in itertools.product(targets or TARGETS_BY_DEFAULT, schemes or SCHEMES):
            options[f"{target} {quant}"] = Options(
                target=target,
                context=context,
                chunk=min(chunk or CHUNK, context),
                quant=quant,
                dtype=dtype or TARGETS[target].dtypes[0],
            )
    artifacts = [dataclasses.replace(part, name=f"{part.target} {part.options.quant}") for part in inputs.artifacts]
    candidates = disambiguate([*artifacts, *to_compile(options, out, overwrite=overwrite, threads=threads)])
    not_run: dict[str, Exception] = {}
    for each in candidates:
        try:
            if not each.exported:
                check_targets([each.target], quant=each.options.quant, dtype=each.options.dtype)
        except TargetError as error:
            not_run[each.name] = error
    rows: list[Row] = []
    if runnable := [each for each in candidates if each.name not in not_run]:
        rows += evaluate_all(Opener(inputs.model), runnable, read, decode_tokens, not_run, on_progress)
    if len(rows) < 2:
        raise _nothing(not_run)
    first, last = split(read.length, decode_tokens)
    return Evaluation(
        model=config.name,
        parameters=inputs.model.parameters,
        source={
            "name": inputs.model.source,
            "revision": inputs.model.revision,
            **({} if inputs.model.rope_scaling is None else {"rope_scaling": inputs.model.rope_scaling}),
        },
        oracle="the model file in eager float32 PyTorch, with the checkpoint's own numbers",
        text={
            "source": read.source,
            "tokens": read.available,
            "sequences": len(read.sequences),
            "length": read.length,
            "scored": read.scored,
            "sha256": read.sha256,
        },
        speed={
            "prefill_tokens": first,
            "decode_tokens": last,
            "repeats": REPEATS,
            "threads": threads or os.cpu_count(),
            "machine": processor(),
        },
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(LIBRARIES),
        not_run={name: reason(error) for name, error in not_run.items()},
        rows=tuple(rows),
    )


def _check_names(kind: str, names: Sequence[str] | None, check: Callable[[str], object]) -> None:
    """Raise what is wrong with the names of schemes or targets, None for the defaults."""
    if names is None:
        return
    for name in names:
        check(name)
    if not names:
        raise ConfigError(f"no {kind} is named: name one, or leave the option out")
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise ConfigError(f"the {kind} {twice!r} is given twice: name it once")


def _check_target(name: str) -> None:
    if name not in TARGETS:
        raise TargetError(f"no target named {name!r}: choose one of {', '.join(TARGETS)}")


def _nothing(not_run: Mapping[str, Exception]) -> TransomError:
    """What to raise if nothing could be run: if there was but one thing to run, its own words."""
    if len(not_run) == 1 and isinstance(error := next(iter(not_run.values())), TransomError):
        return error
    return TargetError(
        "nothing could be evaluated: " + "; ".join(f"{name}: {reason(error)}" for name, error in not_run.items())
    )
