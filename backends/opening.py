"""From an artifact's folder to a session of the right backend. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from transom.backends.artifact import Manifest, read_manifest
from transom.backends.folder import MANIFEST
from transom.backends.runtime import Runtime
from transom.backends.session import Session, Tokenizer
from transom.backends.threads import check_threads
from transom.errors import ArtifactError, TargetError


def open_session(
    folder: Path, *, tokenizer: Tokenizer | None = None, threads: int | None = None, verify: bool = True
) -> Session:
    """Open an artifact.

    Args:
        folder: The artifact.
        tokenizer: Its tokenizer, if text is wanted.
        threads: Threads of the runtime; by default its own choice.
        verify: Whether to check the hash of every file.

    Raises:
        ArtifactError: If the folder is no artifact, or is damaged.
        TargetError: If this library cannot run its target, a part is not installed, or threads are far more than cores.
    """
    check_threads(threads)
    manifest = read_manifest(folder, verify=verify)
    try:
        runtime = _runtime(folder, manifest, threads)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / MANIFEST} lacks what the target {manifest.target!r} needs ({error!r}): export the model again"
        ) from error
    return Session(runtime, stop_ids=manifest.stop_ids, tokenizer=tokenizer, images=manifest.images)


def _runtime(folder: Path, manifest: Manifest, threads: int | None) -> Runtime:
    if manifest.target in ("onnxruntime", "onnx"):
        from transom.backends.onnxruntime.runtime import OnnxRuntime

        return OnnxRuntime(folder, manifest, threads=threads)
    if manifest.target == "xla":
        from transom.backends.xla.runtime import XlaRuntime

        return XlaRuntime(folder, manifest, threads=threads)
    if manifest.target == "tvm":
        from transom.backends.tvm.runtime import TvmRuntime

        return TvmRuntime(folder, manifest, threads=threads)
    if manifest.target == "tensorrt":
        from transom.backends.tensorrt.opening import open_tensorrt

        return open_tensorrt(folder, manifest, threads=threads)
    raise TargetError(f"{folder} is for the target {manifest.target!r}, which this transom cannot run: update transom")
