"""The artifact: a folder that explains itself. Needs no torch.

    model.onnx, model.onnx.data     the payload, of an ONNX target
    manifest.json                   what it is, and a hash of every file
    tokenizer.json                  if the source had a tokenizer
    tokenizer_config.json           its special tokens by role
    chat_template.jinja             if the source had a chat template of its own
    generation_config.json          how its makers sample from it
    validation.json                 its numeric certificate, once `transom validate` has written it

A folder is written under another name and renamed when it is whole: what stands under its own name is never half
made. An export that fails or is interrupted removes its draft; one that is killed leaves a hidden `.NAME.partial-*`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transom.graphs.errors import ArtifactError

VERSION = 2
MANIFEST, MODEL_FILE = "manifest.json", "model.onnx"
_READ_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheRecord:
    """One cache tensor [batch, heads, slots, width] of an artifact.

    Attributes:
        name: "cache.LAYER.key" or "cache.LAYER.value".
        layer: Index of the layer.
        window: Keys that the layer sees; None for a global layer.
        slots: Fixed number of slots; None if they grow with the context.
        heads: Key/value heads.
        width: Numbers in one head.
        dtype: "float32" and so on.
    """

    name: str
    layer: int
    window: int | None
    slots: int | None
    heads: int
    width: int
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapRecord:
    """One intermediate value that the artifact returns after its results; see `graphs.graph.Tap`."""

    name: str
    layer: int | None
    op: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is.

    Attributes:
        target: What it was lowered to.
        model: The model's configuration.
        source: Where the weights came from, and their revision.
        quantization: Name of the scheme.
        dtype: What it computes in.
        context: Longest sequence, in tokens.
        chunk: Largest number of new tokens in one call. Where a runtime writes the caches before it attends, local
            caches hold `window + chunk - 1` slots: what a chunk overwrites must not be in a window any more.
        vocab_size: Width of the logits.
        caches: Every cache tensor.
        taps: Intermediate values that are returned too.
        payload: File that a session opens first.
        details: What the session of this target must know beside.
        tpu: For an artifact compiled for a TPU: {"topology", "libtpu", "programs": {NAME: sizes and costs}}.
        stop_ids: Tokens that end a text.
        bos_id: Token in front of every text.
        passes: What each pass did.
        conversions: What became of every weight that is quantised: number, block, format of the checkpoint, whether
            its codes were kept to the bit, and the error if not.
        not_done: In plain words, what was left undone.
        libraries: Versions that made it.
        files: sha256 and size of every other file; engines, which are built later, have theirs in the details.
    """

    target: str
    model: Mapping[str, Any]
    source: Mapping[str, str]
    quantization: str
    dtype: str
    context: int
    chunk: int
    vocab_size: int
    caches: tuple[CacheRecord, ...]
    taps: tuple[TapRecord, ...]
    payload: str
    details: Mapping[str, Any]
    stop_ids: tuple[int, ...]
    bos_id: int | None
    passes: Sequence[Mapping[str, Any]]
    not_done: Sequence[str]
    libraries: Mapping[str, str]
    tpu: Mapping[str, Any] | None = None
    conversions: Sequence[Mapping[str, Any]] = ()
    files: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the version of the format in front."""
        return {"version": VERSION, **dataclasses.asdict(self)}


def check_absent(path: Path, *, overwrite: bool = False, proof: str = MANIFEST) -> None:
    """Raise `ArtifactError` if something of that name exists and must not be replaced.

    Only what transom made ever may: an artifact, or another folder that holds the file `proof`.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise ArtifactError(f"{path} exists already: choose another name, or pass --overwrite")
    if not (path / proof).is_file():
        kind = "an artifact of transom" if proof == MANIFEST else f"a folder with a {proof} of transom"
        raise ArtifactError(f"{path} is not {kind}, so it is not replaced: choose another name")


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False, proof: str = MANIFEST) -> Iterator[Path]:
    """A folder that takes the name `path` only when the block ends without an error.

    Raises:
        ArtifactError: If something of that name exists and `overwrite` is off or it is no artifact, or its parent
            cannot be written, or the disk is full.
    """
    path = path.resolve()
    check_absent(path, overwrite=overwrite, proof=proof)
    draft = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot write to {path.parent}: {error.strerror}") from error
    try:
        yield draft
        check_absent(path, overwrite=overwrite, proof=proof)
        if path.exists():
            retired = path.parent / f".{path.name}.replaced-{uuid.uuid4().hex[:8]}"
            os.rename(path, retired)
            try:
                os.rename(draft, path)
            except OSError:
                os.rename(retired, path)
                raise
            shutil.rmtree(retired)
        else:
            os.rename(draft, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in the folder and write the manifest beside them."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    hashes = _hashes([folder / name for name in names])
    files = {
        name: {"sha256": digest, "bytes": (folder / name).stat().st_size}
        for name, digest in zip(names, hashes, strict=True)
    }
    manifest = dataclasses.replace(manifest, files=files)
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n")
    return manifest


def update_details(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the details in a manifest, as it stands now.

    Raises:
        ArtifactError: If it cannot be read or written.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text())
        change(data["details"])
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"cannot update {path}: {error}") from error
    replace_file(path, json.dumps(data, indent=1) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a file; a reader sees the old one or the new one, never a part.

    Raises:
        ArtifactError: If it cannot be written.
    """
    # A link stays a link; what is no file, such as a terminal, has no draft.
    path = path.resolve()
    draft = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def read_manifest(folder: Path, *, verify: bool = True) -> Manifest:
    """Read an artifact's manifest.

    Args:
        folder: The artifact.
        verify: Also check size and hash of every file.

    Raises:
        ArtifactError: If the folder is no artifact, of an unknown version, or not as it was written.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: export a model to it first (transom export MODEL -o {folder})")
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text())
        version = data.pop("version")
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {MANIFEST}: it is not an artifact of transom") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): export the model again") from error
    if version != VERSION:
        raise ArtifactError(f"{path} is of version {version}, this transom reads {VERSION}: use a matching transom")
    try:
        data["caches"] = tuple(CacheRecord(**record) for record in data["caches"])
        data["taps"] = tuple(TapRecord(**record) for record in data["taps"])
        manifest = Manifest(**{**data, "stop_ids": tuple(data["stop_ids"])})
        for entry in manifest.files.values():
            entry["sha256"], entry["bytes"]
        manifest.model["name"], manifest.source["name"], manifest.source["revision"], manifest.files[manifest.payload]
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is malformed ({error}): export the model again") from error
    _check_files(folder, manifest, hashes=verify)
    return manifest


def _check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    paths = [folder / name for name in manifest.files]
    for path, entry in zip(paths, manifest.files.values(), strict=True):
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: export the model again")
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}: export the model again")
    if hashes:
        for path, entry, digest in zip(paths, manifest.files.values(), _hashes(paths), strict=True):
            if digest != entry["sha256"]:
                raise ArtifactError(f"{path} is not what was exported (its sha256 differs): export the model again")


def _hashes(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(hash_of, paths))


def hash_of(path: Path) -> str:
    """The sha256 of a file."""
    # A mapped file would count as resident memory, so it is read through one small buffer a thread.
    digest = hashlib.sha256()
    buffer = memoryview(_buffer())
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


_local = threading.local()


def _buffer() -> bytearray:
    if not hasattr(_local, "buffer"):
        _local.buffer = bytearray(_READ_BYTES)
    buffer: bytearray = _local.buffer
    return buffer
