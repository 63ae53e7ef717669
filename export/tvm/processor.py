"""The processor that machine code is made for: its name to LLVM, its vector registers, what it must be able to do."""

from __future__ import annotations

import dataclasses
import platform
import sys
from typing import Any

from tvm.target import Target, codegen

from transom.backends.tvm.machine import FEATURES, machine
from transom.errors import TargetError
from transom.export.tvm.kernels.tile import AVX2, AVX512, NEON, SSE, Tile

LEVELS = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset({"avx2", "fma", "bmi", "bmi2", "f16c", "lzcnt", "movbe"}),
    "x86-64-v2": frozenset({"sse4.2", "popcnt"}),
}
"""Levels of x86-64 processors, best first, with what distinguishes each from the next; in LLVM's words."""

LINUX = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
"""Triple by machine, for every machine that code can be made for from elsewhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """A kind of processor.

    Attributes:
        machine: "x86_64" or "aarch64".
        triple: Machine and system, in LLVM's words.
        cpu: LLVM's name of the processor.
        needs: Features that a machine must have to run the code, in the kernel's words.
        tile: Sizes of the innermost loops.
    """

    machine: str
    triple: str
    cpu: str
    needs: tuple[str, ...]
    tile: Tile

    @property
    def is_native(self) -> bool:
        """Whether this computer's own C compiler links for it."""
        return self.machine == machine() and self.triple == _host_triple()

    def target(self) -> Target:
        """What TVM compiles for."""
        options: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu}
        if self.tile is AVX512:
            # LLVM would halve wide vectors, as the first processors with AVX-512 slowed down for them.
            options["mattr"] = ["-prefer-256-bit"]
        return Target(options)


def processor(name: str | None) -> Processor:
    """Look a processor up.

    Args:
        name: "x86_64" or "aarch64" for the baseline of a family, or LLVM's name of a processor, such as "x86-64-v3" or
            "neoverse-n1"; None for this machine (the highest level of x86-64 that it has, or the baseline).

    Raises:
        TargetError: If there is no such processor.
    """
    if name is None:
        return _describe(machine(), _host_triple(), _host_cpu())
    if name in LINUX:
        return _describe(name, LINUX[name], "x86-64" if name == "x86_64" else "generic")
    for family, triple in LINUX.items():
        if codegen.llvm_is_valid_cpu(name, triple):
            return _describe(family, triple, name)
    raise TargetError(
        f"no processor named {name!r}: give aarch64, x86-64-v3, x86-64-v4 or another name that LLVM knows"
    )


def _describe(family: str, triple: str, cpu: str) -> Processor:
    has = _features(triple, cpu)
    if family == "aarch64":
        tile = NEON
    else:
        tile = AVX512 if "avx512f" in has else AVX2 if {"avx2", "fma"} <= has else SSE
    needs = tuple(sorted(FEATURES[name] for name in has & FEATURES.keys()))
    return Processor(machine=family, triple=triple, cpu=cpu, needs=needs, tile=tile)


def _features(triple: str, cpu: str) -> frozenset[str]:
    return frozenset(map(str, codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu}))))


def _host_triple() -> str:
    family = machine()
    if family not in LINUX:
        raise TargetError(f"no kernels for this machine ({platform.machine()}): name another one with --cpu")
    return LINUX[family] if sys.platform == "linux" else str(codegen.llvm_get_system_triple())


def _host_cpu() -> str:
    if machine() != "x86_64":
        return "generic"
    has = _features(_host_triple(), str(codegen.llvm_get_system_cpu()))
    levels = list(LEVELS)
    for index, level in enumerate(levels):
        if all(LEVELS[lower] <= has for lower in levels[index:]):
            return level
    return "x86-64"
