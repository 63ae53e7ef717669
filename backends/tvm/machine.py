"""What the machine that runs an artifact is, and whether code that was made for another one may run on it."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.errors import TargetError

FEATURES = {
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "movbe": "movbe",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "lse": "atomics",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
"""The Linux kernel's word for a feature, by LLVM's."""

_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}
_CPUINFO = Path("/proc/cpuinfo")


def machine() -> str:
    """This machine's family: "x86_64", "aarch64" or what the system says."""
    name = platform.machine().lower()
    return _ALIASES.get(name, name)


def has_features() -> frozenset[str] | None:
    """Features of the processor, as the Linux kernel names them; None where it reports none."""
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return None
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else None


def require_machine(details: Mapping[str, Any]) -> None:
    """Check that code runs here.

    Args:
        details: A manifest's {"machine", "triple", "cpu", "needs"}.

    Raises:
        TargetError: If it was made for another family of processors, another system, or a processor that can do more.
    """
    contents = f"this artifact holds machine code for {details['cpu']} ({details['triple']})"
    again = "export the model on this machine, or for it with --cpu"
    if details["machine"] != machine() or ("linux" in details["triple"]) != (sys.platform == "linux"):
        raise TargetError(f"{contents}, this is {machine()} on {sys.platform}: {again}")
    has = has_features()
    if has is not None and (lacking := sorted(set(details["needs"]) - has)):
        raise TargetError(f"{contents}, this processor lacks {', '.join(lacking)}: {again}")
