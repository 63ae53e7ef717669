"""TVM's runtime without its compiler: two libraries of the apache-tvm wheel, loaded by path."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transom.backends.tvm.versions import INSTALL, require
from transom.errors import ArtifactError, TargetError

FOLDER_VARIABLE = "TRANSOM_TVM_RUNTIME"
"""Environment variable with the folder of the two libraries; by default that of the installed apache-tvm."""

BIND_VARIABLE = "TVM_BIND_THREADS"
"""Environment variable by which TVM is told to pin threads to cores. Left to itself it pins the calling thread too, to
the first core and for good, so that whatever else runs in the process shares that core; here it does if asked to."""

CPU, POOLED = 1, 2
"""TVM's numbers for a kind of device, and for an allocator that keeps memory for the next call."""


@functools.cache
def runtime() -> Any:
    """The module `tvm_ffi`, with the runtime's functions registered.

    Raises:
        TargetError: If a part is missing, or of another version than the exporter's.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    require("apache-tvm-ffi", *(() if folder else ("apache-tvm",)))
    os.environ.setdefault(BIND_VARIABLE, "0")
    try:
        with _without_torch():
            import tvm_ffi
    except ImportError as error:
        raise TargetError(f"running this artifact needs TVM's runtime ({error}): {INSTALL}") from None
    if "tvm" not in sys.modules:
        for path in _libraries(Path(folder) if folder else _installed()):
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise TargetError(f"TVM's runtime cannot be loaded ({error}): {INSTALL}") from None
    return tvm_ffi


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide torch from imports: tvm_ffi loads it wherever it is installed, which takes seconds and 200 MB."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def _installed() -> Path:
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise TargetError(f"running this artifact needs TVM's runtime, which is missing: {INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "lib"


def _libraries(folder: Path) -> list[Path]:
    ending = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    paths = [folder / f"libtvm_runtime{part}{ending}" for part in ("", "_extra")]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise TargetError(f"{folder} holds no {' and no '.join(missing)}: {INSTALL}, or mend {FOLDER_VARIABLE}")
    return paths


def load_machine(library: Path) -> Any:
    """A virtual machine with the functions of a library.

    Raises:
        TargetError: If the runtime is missing.
        ArtifactError: If the library cannot be loaded.
    """
    ffi = runtime()
    try:
        with _path_of_its_own(library) as path:
            machine = ffi.load_module(str(path))["vm_load_executable"]()
        machine["vm_initialization"](CPU, 0, POOLED, CPU, 0, POOLED)
    except Exception as error:  # the runtime raises whatever class the failing part chose
        raise ArtifactError(f"TVM cannot load {library}: {str(error).strip().splitlines()[0]}") from error
    return machine


@contextlib.contextmanager
def _path_of_its_own(library: Path) -> Iterator[Path]:
    """A path that no library was loaded from: the loader takes equal paths for the same library, replaced or not."""
    with tempfile.TemporaryDirectory(prefix="transom-") as folder:
        path = Path(folder) / library.name
        path.symlink_to(library.resolve())
        yield path


_pools = threading.local()


def use_threads(count: int | None) -> None:
    """Make the calling thread's pool one of `count` threads (by default TVM's own choice)."""
    if getattr(_pools, "count", None) == (count or 0):
        return
    mode_any = 0
    runtime().get_global_func("runtime.config_threadpool")(mode_any, count or 0)
    _pools.count = count or 0
