"""Hugging Face folders: `model.safetensors`, or shards and an index.

The format is a length, a JSON header and the bytes, so the ranges are read straight from the file: nothing stays
mapped between two reads, and peak memory is what was asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

from transom.graphs.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.zoo.architectures import tensor_shapes
from transom.zoo.checkpoints.checkpoint import Checkpoint
from transom.zoo.config import DecoderConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that weights may have, by the format's names."""

# The text part's prefix: text-only checkpoints, the first multimodal ones, those since transformers 4.52, a bare trunk.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor stands: absolute bytes [start, stop) of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def open_safetensors(folder: Path, config: DecoderConfig) -> Checkpoint:
    """Find the text decoder's weights; nothing but headers is read.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
        config: Says which tensors are needed, and their shapes.

    Returns:
        Weights in the dtype of the checkpoint.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt, or a tensor is missing or has the wrong shape or
            dtype.
    """
    entries: dict[str, Entry] = {}
    for path in _files(folder):
        entries |= read_entries(path)[0]
    shapes = tensor_shapes(config)
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in entries), _PREFIXES[0])
    if missing := [prefix + name for name in shapes if prefix + name not in entries]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shapes)} tensors are missing: {shown}: fetch the complete checkpoint"
        )
    return Checkpoint(
        weights={name: _weight(prefix + name, entries[prefix + name], shape) for name, shape in shapes.items()}
    )


def revision(folder: Path) -> str:
    """Identity of a folder's weights without reading them: SHA-256 over every header and file size."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(_header_bytes(path))
    return f"headers-sha256:{digest.hexdigest()}"


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder}: has neither model.safetensors nor its .index.json: give a checkpoint folder")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a valid index ({error!r}): fetch it again") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: shards named by the index are missing: {', '.join(missing)}: fetch them")
    return [folder / name for name in names]


def _header_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path}: not a safetensors file, or cut within its header: fetch it again")
        return file.read(length)


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where every tensor of a file stands, and the file's metadata.

    Raises:
        CheckpointError: If the file is truncated or corrupt.
    """
    raw = _header_bytes(path)
    base, size = 8 + len(raw), path.stat().st_size
    try:
        header: dict[str, Any] = json.loads(raw)
        entries = {
            name: Entry(
                path=path,
                dtype=item["dtype"],
                shape=tuple(item["shape"]),
                start=base + item["data_offsets"][0],
                stop=base + item["data_offsets"][1],
            )
            for name, item in header.items()
            if name != "__metadata__"
        }
        metadata = dict(header.get("__metadata__") or {})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: the header is corrupt ({error!r}): fetch the file again") from error
    expected = max((entry.stop for entry in entries.values()), default=base)
    if size != expected:
        raise CheckpointError(f"{path}: {size} bytes, but its header describes {expected}: fetch the file again")
    return entries, metadata


def read_bytes(entry: Entry, start: int, stop: int) -> torch.Tensor:
    """Bytes [start, stop) of a tensor, uint8.

    Raises:
        CheckpointError: If the file has become shorter.
    """
    buffer = torch.empty(stop - start, dtype=torch.uint8)
    with entry.path.open("rb") as file:
        file.seek(entry.start + start)
        got = file.readinto(buffer.numpy().data)
    if got != buffer.numel():
        raise CheckpointError(f"{entry.path}: ended while it was read: it changed since it was opened")
    return buffer


def _weight(name: str, entry: Entry, shape: tuple[int, ...]) -> Weight:
    origin = f"{entry.path}: {name}"
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{origin} is {entry.dtype}, expected one of {', '.join(DTYPES)}: convert the checkpoint")
    dtype = DTYPES[entry.dtype]
    if entry.shape != shape:
        if name.endswith("embed_tokens.weight") and entry.shape[1:] == shape[1:]:
            raise CheckpointError(
                f"{origin} has {entry.shape[0]} vocabulary rows, but config.json says vocab_size {shape[0]}: "
                "set vocab_size to the rows of the checkpoint"
            )
        raise CheckpointError(
            f"{origin} has shape {list(entry.shape)}, expected {list(shape)}: config.json belongs to another checkpoint"
        )
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    if entry.stop - entry.start != shape[0] * row_bytes:
        raise CheckpointError(
            f"{origin} has {entry.stop - entry.start} bytes, expected {shape[0] * row_bytes}: fetch the file again"
        )
    return Weight(
        shape=shape,
        dtype=dtype,
        read_rows=functools.partial(_read_rows, entry, dtype, row_bytes),
        origin=origin,
    )


def _read_rows(entry: Entry, dtype: torch.dtype, row_bytes: int, start: int, stop: int) -> torch.Tensor:
    return read_bytes(entry, start * row_bytes, stop * row_bytes).view(dtype).view(stop - start, *entry.shape[1:])
