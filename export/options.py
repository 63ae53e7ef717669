"""All that decides what an artifact of a model is, checked in one place."""

from __future__ import annotations

import dataclasses

from transom.backends.artifact import Manifest
from transom.errors import ContextLengthError, TargetError
from transom.formats.schemes import SCHEMES, scheme
from transom.passes.targets import TARGETS, Target
from transom.zoo.config import DecoderConfig
from transom.zoo.model import Model

CHUNK = 256
"""Default for the largest number of new tokens in one call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a model is compiled to. `Options.of` fills in and checks; whoever builds one without it checks nothing.

    Attributes:
        target: A key of `passes.targets.TARGETS`.
        context: Longest sequence, in tokens.
        chunk: Largest number of new tokens in one call.
        quant: Name of a quantisation scheme.
        dtype: What to compute in: "float32", "bfloat16" or "float16".
        topology: For "xla": TPU topology to compile for ahead of time, such as "v5e:2x2".
        cpu: For "tvm": processor to make machine code for, such as "aarch64"; by default this machine's.
    """

    target: str
    context: int
    chunk: int
    quant: str = "none"
    dtype: str = "float32"
    topology: str | None = None
    cpu: str | None = None

    @staticmethod
    def of(
        model: Model,
        *,
        target: str = "onnxruntime",
        quant: str | None = None,
        context: int | None = None,
        chunk: int | None = None,
        dtype: str | None = None,
        topology: str | None = None,
        cpu: str | None = None,
    ) -> Options:
        """Options for a model. By default the codes beside its checkpoint, its own context, the target's first dtype.

        Raises:
            TargetError: If the target is unknown, or lacks what is asked of it.
            QuantizationError: If the scheme is unknown.
            ContextLengthError: If the context is longer than the model's.
        """
        check_context(model.config, context)
        context = model.config.context if context is None else context
        quant = model.quant if quant is None else quant
        return Options(
            target=target,
            context=context,
            chunk=min(CHUNK if chunk is None else chunk, context),
            quant=quant,
            dtype=check_options(target, quant, dtype, topology=topology, cpu=cpu),
            topology=topology,
            cpu=cpu,
        )

    @staticmethod
    def of_artifact(manifest: Manifest) -> Options:
        """What an artifact was compiled with, as far as its manifest tells."""
        return Options(
            target=manifest.target,
            context=manifest.context,
            chunk=manifest.chunk,
            quant=manifest.quantization,
            dtype=manifest.dtype,
        )


def check_context(config: DecoderConfig, context: int | None) -> None:
    """Raise `ContextLengthError` for a context that the model does not have."""
    if context is not None and not 1 <= context <= config.context:
        raise ContextLengthError(
            f"a context of {context} tokens was asked for, {config.name} was made for 1 to {config.context}"
        )


def check_options(target: str, quant: str, dtype: str | None, **given: str | None) -> str:
    """The dtype to compute in, if the target has it and takes all that is asked of it; raises `TargetError` if not."""
    if target not in TARGETS:
        raise TargetError(f"no target named {target!r}: choose one of {', '.join(TARGETS)}")
    able = TARGETS[target]
    quant_scheme = scheme(quant)
    if lacking := sorted({spec.format for spec in quant_scheme.specs} - able.formats):
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
        if all(spec.format in target.formats and not target.refuses(spec) for spec in quant_scheme.specs)
        and (quant_scheme.activations is None or quant_scheme.activations in target.activations)
    ]
    return f"{', '.join(names[:-1])} or {names[-1]}"
