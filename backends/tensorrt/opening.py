"""A session of a `tensorrt` artifact: its engine where one is for this GPU, else the CPU's check of its numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transom.backends.artifact import Manifest
from transom.backends.session import Session, Tokenizer
from transom.backends.tensorrt.cpu import CpuSession
from transom.backends.tensorrt.engines import EngineRecord, engines
from transom.backends.tensorrt.library import Library, find_library
from transom.graphs.errors import TargetError


def open_tensorrt(
    folder: Path, manifest: Manifest, *, tokenizer: Tokenizer | None = None, threads: int | None = None
) -> Session:
    """Open an artifact; `note` of the session says why no engine runs, if none does.

    Raises:
        TargetError: If ONNX Runtime, which stands in for a GPU, is missing or too old.
        ArtifactError: If an engine or the model cannot be read.
    """
    try:
        record, library = _engine(manifest)
    except TargetError as error:
        session = CpuSession(folder, manifest, tokenizer=tokenizer, threads=threads)
        session.note = f"its ONNX file runs on the CPU, to check numbers, not for speed: {error}"
        return session
    from transom.backends.tensorrt.runtime import EngineSession

    return EngineSession(folder, manifest, record, library, tokenizer=tokenizer)


def _engine(manifest: Manifest) -> tuple[EngineRecord, Library]:
    """The engine to run, and what runs it."""
    compute = _gpu()
    found = engines(manifest)
    if not found:
        raise TargetError("no engine was built: transom build")
    # An engine that was built for this very machine is preferred to one that is portable.
    for record in sorted(found, key=lambda record: (record.library != "tensorrt", record.portable)):
        if record.compute and compute not in record.compute:
            continue
        library = find_library(rtx=record.library == "tensorrt_rtx")
        if (library.name, library.version) == (record.library, record.version):
            return record, library
    raise TargetError(
        f"no engine is for this GPU (compute capability {compute}) and the TensorRT that is installed: transom build"
    )


def _gpu() -> int:
    """Compute capability of the first GPU, times ten."""
    if importlib.util.find_spec("torch") is None:
        raise TargetError("torch, which finds the GPU, is not installed")
    import torch

    if not torch.cuda.is_available():
        raise TargetError("torch finds no GPU")
    major, minor = torch.cuda.get_device_capability()
    return int(major) * 10 + int(minor)
