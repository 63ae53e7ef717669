"""Finds TensorRT, or TensorRT for RTX, wherever its wheels left it."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

from transom.backends.tensorrt.engines import TITLES
from transom.errors import TargetError

MINIMUM = (10, 15)
"""First version of TensorRT with TensorScatter, RotaryEmbedding and RMSNormalization."""

INSTALL = (
    "with an NVIDIA GPU pip install 'transom[tensorrt]', without one pip install 'transom[tensorrt-rtx]' and pass --rtx"
)

_RTX_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
"""Package whose wheel brings the shared libraries of TensorRT for RTX."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """A TensorRT that was found.

    Attributes:
        module: Its Python bindings.
        name: "tensorrt" or "tensorrt_rtx".
        version: Of the library.
    """

    module: Any
    name: str
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT for RTX."""
        return self.name == "tensorrt_rtx"

    @property
    def title(self) -> str:
        """As people call it."""
        return f"{TITLES[self.name]} {self.version}"


def find_library(*, rtx: bool = False) -> Library:
    """TensorRT 10.15 or newer if it is installed, else TensorRT for RTX.

    Args:
        rtx: Look for TensorRT for RTX only.

    Raises:
        TargetError: If there is none, or it is too old.
    """
    reasons = []
    if not rtx:
        try:
            module = importlib.import_module("tensorrt")
            library = Library(module=module, name="tensorrt", version=str(module.__version__))
            if _is_recent(library):
                return library
            reasons.append(f"TensorRT {library.version} has no TensorScatter, {MINIMUM[0]}.{MINIMUM[1]} has")
        except (ImportError, OSError, AttributeError) as error:
            reasons.append(_line(error))
    try:
        module = _import_rtx()
        return Library(module=module, name="tensorrt_rtx", version=str(module.__version__))
    except (ImportError, OSError, AttributeError) as error:
        reasons.append(_line(error))
    raise TargetError(f"no TensorRT that would do is installed ({'; '.join(reasons)}): {INSTALL}")


def _is_recent(library: Library) -> bool:
    major, minor = (int(part) for part in re.findall(r"\d+", library.version)[:2])
    return (major, minor) >= MINIMUM


def _import_rtx() -> Any:
    """NVIDIA's own package, or the bare bindings with the libraries of ONNX Runtime's wheel."""
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        return importlib.import_module("tensorrt_rtx")
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        raise ImportError("No module named 'tensorrt_rtx'")
    # Not imported, as that would bring another ONNX Runtime.
    spec = importlib.util.find_spec(_RTX_LIBRARIES)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # The parser needs the library, and the bindings need both.
        for stem in ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so"):
            for path in sorted(Path(folder).glob(f"{stem}.*"))[-1:]:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
