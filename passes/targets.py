"""Targets by name, and what they can do. Imports nothing heavy, so that a command line can list them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from transom.formats.schemes import BITS, QuantSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What can be asked of a target.

    Attributes:
        text: The target in words.
        extra: The extra of this package that brings what it needs; None if nothing more is needed.
        dtypes: What it can compute in; the first one is the default.
        formats: What quantised weights may be made of; see `formats.schemes.Format`.
        refuses: Why it cannot hold weights of a spec of these numbers; None if it can.
        activations: What activations may be rounded to.
        options: Export options that only some targets take: "topology", "cpu".
    """

    text: str
    extra: str | None = None
    dtypes: tuple[str, ...] = ("float32",)
    formats: frozenset[str] = frozenset(BITS)
    refuses: Callable[[QuantSpec], str | None] = lambda spec: None
    activations: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()


def _tensorrt(spec: QuantSpec) -> str | None:
    if not spec.symmetric:
        return "it takes no zero points"
    if spec.has_offsets:
        return "it takes no offsets"
    if spec.signed_scale:
        return "it takes positive scales only"
    if not spec.is_integer and isinstance(spec.block, int):
        return "it takes 8-bit floats with one scale a row"
    return None


_FLOAT8 = frozenset({"float8_e4m3fn"})

TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        text="ONNX Runtime on CPUs, with its fastest operators (1.29 and newer)", activations=_FLOAT8
    ),
    "onnx": Target(text="standard ONNX of opset 24, for any runtime that has it", activations=_FLOAT8),
    "xla": Target(
        text="StableHLO for XLA on CPUs, GPUs and TPUs; compiled ahead of time for a TPU with --topology",
        extra="xla",
        dtypes=("float32", "bfloat16", "float16"),
        activations=_FLOAT8,
        options=frozenset({"topology"}),
    ),
    "tvm": Target(
        text="machine code made by Apache TVM, for this CPU or for another one with --cpu",
        extra="tvm",
        options=frozenset({"cpu"}),
    ),
    "tensorrt": Target(
        text="strongly typed ONNX for TensorRT (10.15 and newer) and TensorRT for RTX; transom build makes the engine",
        dtypes=("bfloat16", "float16"),
        formats=frozenset({"int4", "float8_e4m3fn"}),
        refuses=_tensorrt,
        activations=_FLOAT8,
    ),
}
