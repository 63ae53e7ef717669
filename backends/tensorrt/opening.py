"""The runtime of a `tensorrt` artifact: its engine where one is for this GPU, else the CPU's check of its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transom.backends.artifact import DECODE, ENCODE_IMAGE, Manifest
from transom.backends.runtime import Runtime
from transom.backends.tensorrt.engines import EngineRecord, engines
from transom.backends.tensorrt.gpu import this_gpu
from transom.backends.tensorrt.library import Library, find_library
from transom.errors import ArtifactError, TargetError


def open_tensorrt(folder: Path, manifest: Manifest, *, threads: int | None = None) -> Runtime:
    """Open an artifact; `note` of the runtime says why no engine runs, if none does.

    Raises:
        TargetError: If ONNX Runtime, which stands in for a GPU, is missing or too old.
        ArtifactError: If the model cannot be read.
    """
    reason = "no engine is for this GPU and the TensorRT that is installed: transom build"
    try:
        for record, library in candidates(folder, manifest):
            from transom.backends.tensorrt.runtime import EngineRuntime

            images = (one for one, own in candidates(folder, manifest, ENCODE_IMAGE) if own == library)
            try:
                return EngineRuntime(folder, manifest, record, library, encoder=next(images, None))
            except ArtifactError as error:
                reason = str(error)
    except TargetError as error:
        reason = str(error)
    from transom.backends.tensorrt.cpu import CpuRuntime

    runtime = CpuRuntime(folder, manifest, threads=threads)
    runtime.note = f"its ONNX file runs on the CPU, to check numbers, not for speed: {reason}"
    return runtime


def candidates(folder: Path, manifest: Manifest, entry: str = DECODE) -> Iterator[tuple[EngineRecord, Library]]:
    """Engines of an entry that can run here, with what runs them.

    First one for this very GPU, then a portable one, then RTX's.

    Raises:
        TargetError: If there is no GPU, or no engine at all.
    """
    compute, gpu = this_gpu()
    records = engines(manifest)
    if not records:
        raise TargetError("no engine was built: transom build")
    for record in sorted(records, key=lambda record: (record.library != "tensorrt", record.portable)):
        if record.entry != entry or not record.fits(compute, gpu):
            continue
        try:
            library = find_library(rtx=record.library == "tensorrt_rtx")
        except TargetError:
            continue
        if (library.name, library.version) == (record.library, record.version) and record.stands(folder):
            yield record, library
