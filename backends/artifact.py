"""The artifact: a folder that explains itself. Needs no torch.

    model.onnx, model.onnx.data     the payload, of an ONNX target
    encode_image.onnx, .data        its encoder of images, if it has one
    preprocess.onnx                 what makes its pixels of an image
    manifest.json                   what it is, and a hash of every file
    tokenizer.json                  if the source had a tokenizer
    tokenizer_config.json           its special tokens by role
    chat_template.jinja             if the source had a chat template of its own
    generation_config.json          how its makers sample from it
    validation.json                 its numeric certificate, once `transom validate` has written it

How it comes to be whole or not at all: see `folder`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transom.backends.folder import MANIFEST, is_plain, replace_file
from transom.backends.records import checked, record
from transom.errors import ArtifactError
from transom.graphs.images import Images
from transom.graphs.state import BATCH, SLOTS, Port, State
from transom.json_object import read_object

VERSION = 3
DECODE, ENCODE_IMAGE = "decode", "encode_image"
_AGAIN = "export the model again"
MODEL_FILE, PREPROCESS_FILE = "model.onnx", "preprocess.onnx"
_READ_BYTES = 4 * 2**20

_MOST_ALTERED = 64 * 2**20
"""Bytes of the largest file that is looked into when its size is not what it was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapRecord:
    """One intermediate value that the artifact returns after its results; see `graphs.graph.Tap`."""

    name: str
    layer: int | None
    op: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One graph of an artifact.

    Attributes:
        inputs: What a caller gives at every call, by name; states are not among it.
        outputs: What a caller gets, by name; neither states nor taps are among it.
        states: What is kept from call to call.
        taps: Intermediate values that are returned too.
        payload: File that a session opens first.
    """

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    states: tuple[State, ...]
    taps: tuple[TapRecord, ...]
    payload: str


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
        entries: Its graphs by name, over one store of weights. "decode" takes tokens, with earlier ones in its states.
        details: What the session of this target must know beside.
        tpu: For an artifact compiled for a TPU: {"topology", "libtpu", "programs": {NAME: sizes and costs}}.
        stop_ids: Tokens that end a text.
        bos_id: Token in front of every text.
        passes: What each pass did.
        conversions: What became of every weight that is quantised: number, block, format of the checkpoint, whether
            its codes were kept to the bit, and the error if not.
        not_done: In plain words, what was left undone.
        images: What an image is among its tokens; None if it takes none. Its entry "encode_image" then takes pixels.
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
    entries: Mapping[str, Entry]
    details: Mapping[str, Any]
    stop_ids: tuple[int, ...]
    bos_id: int | None
    passes: Sequence[Mapping[str, Any]]
    not_done: Sequence[str]
    libraries: Mapping[str, str]
    tpu: Mapping[str, Any] | None = None
    conversions: Sequence[Mapping[str, Any]] = ()
    images: Images | None = None
    files: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def decode(self) -> Entry:
        """The entry that sessions run."""
        return self.entries[DECODE]

    @property
    def soft_width(self) -> int:
        """Width of the soft tokens that it takes in the place of an image; 0 if it takes none."""
        return (self.decode.inputs["soft"].sizes[-1] or 0) if self.images is not None else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the version of the format in front."""
        return {"version": VERSION, **dataclasses.asdict(self)}


class _Model(TypedDict):
    name: str


class _Source(TypedDict):
    name: str
    revision: str


class _File(TypedDict):
    sha256: str
    bytes: int


class _Pass(TypedDict):
    name: str
    changes: int
    nodes_before: int
    nodes_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    notes: NotRequired[Sequence[str]]


class _Conversion(TypedDict):
    number: str
    block: int
    source: str | None
    kept: bool
    recovered: int
    error: float


class _Program(TypedDict):
    argument_bytes: float
    alias_bytes: float
    temp_bytes: float
    peak_bytes: float
    flops: float
    compile_s: float


class _Tpu(TypedDict):
    topology: str
    devices: int
    libtpu: str
    programs: Mapping[str, _Program]


_HINTS: Mapping[str, Any] = {
    "files": Mapping[str, _File],
    "passes": Sequence[_Pass],
    "conversions": Sequence[_Conversion],
    "tpu": _Tpu | None,
    "model": _Model,
    "source": _Source,
}
"""What readers of a manifest count on, beyond the annotations of `Manifest`."""


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
    data = read_object(path, ArtifactError, _AGAIN)
    try:
        if data is None:
            raise FileNotFoundError(f"there is no {MANIFEST}")
        change(data["details"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"cannot update {path}: {error}") from error
    replace_file(path, json.dumps(data, indent=1) + "\n")


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
    if (data := read_object(path, ArtifactError, _AGAIN)) is None:
        raise ArtifactError(f"{folder} holds no {MANIFEST}: it is not an artifact of transom")
    if (version := data.pop("version", None)) != VERSION:
        raise ArtifactError(
            f"{path} is of version {version!r}, this transom reads {VERSION}: export the model again, or use a "
            "matching transom"
        )
    try:
        manifest = record(Manifest, data)
        for name, hint in _HINTS.items():
            checked(getattr(manifest, name), hint, name)
        _check_sizes(manifest)
        _check_names(manifest)
    except ValueError as error:
        raise ArtifactError(f"{path} is malformed ({error}): export the model again") from error
    _check_files(folder, manifest, hashes=verify)
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    sizes: dict[str, int | None] = {name: getattr(manifest, name) for name in ("context", "chunk", "vocab_size")}
    for state in (state for entry in manifest.entries.values() for state in entry.states):
        if len(state.axes) != len(state.sizes) or len(set(state.axes)) != len(state.axes):
            raise ValueError(f"{state.name} has {len(state.sizes)} sizes for the axes {', '.join(state.axes)}")
        for axis, size in zip(state.axes, state.sizes, strict=True):
            if size is None and axis not in (BATCH, SLOTS):
                raise ValueError(f"{axis} of {state.name} has no size")
            sizes[f"{axis} of {state.name}"] = size
        sizes[f"window of {state.name}"] = state.window
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}, not 1 or more")


def _check_names(manifest: Manifest) -> None:
    for name in manifest.files:
        if not is_plain(name):
            raise ValueError(f"the file {name!r} is not in the folder")
    if DECODE not in manifest.entries:
        raise ValueError(f"there is no entry {DECODE!r}")
    for entry in manifest.entries.values():
        if entry.payload not in manifest.files:
            raise ValueError(f"the payload {entry.payload!r} is not among its files")
        names = [
            *entry.inputs,
            *entry.outputs,
            *(state.name for state in entry.states),
            *(tap.name for tap in entry.taps),
        ]
        if len(set(names)) != len(names):
            raise ValueError("two of its inputs, outputs, states and taps have one name")


def _check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    paths = [folder / name for name in manifest.files]
    for path, entry in zip(paths, manifest.files.values(), strict=True):
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: export the model again")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ArtifactError(f"{path} has {size} bytes, not {entry['bytes']}: {_remedy(path, entry['sha256'])}")
    if hashes:
        for path, entry, digest in zip(paths, manifest.files.values(), _hashes(paths), strict=True):
            if digest != entry["sha256"]:
                raise ArtifactError(f"{path} is not what was exported (its sha256 differs): export the model again")


def _remedy(path: Path, sha256: str) -> str:
    """What to do about a file of another size than it was written with: git alters files in two well-known ways."""
    if path.stat().st_size > _MOST_ALTERED:
        return "export the model again"
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        return "this is git's pointer to it, so run git lfs pull"
    if hashlib.sha256(data.replace(b"\r", b"")).hexdigest() == sha256:
        return "git changed its line ends, so check it out again with core.autocrlf off, or export the model again"
    return "export the model again"


def _hashes(paths: Iterable[Path]) -> list[str]:
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
