"""Hugging Face folders: `model.safetensors`, or shards and an index."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from transom import safetensors_file
from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.json_object import is_file, read_object
from transom.safetensors_file import Entry
from transom.zoo.architectures import architecture, tensor_shapes
from transom.zoo.checkpoints.checkpoint import Checkpoint, left_out_line
from transom.zoo.checkpoints.containers import ADAPTER, MERGE, POINTER, explain_missing, is_pointer
from transom.zoo.checkpoints.layout import Layout
from transom.zoo.checkpoints.redundant import check_redundant
from transom.zoo.checkpoints.stacked import BLOCKS, SCALES, Stacked
from transom.zoo.config import DecoderConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that weights may have, by the format's names."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_safetensors(folder: Path, config: DecoderConfig) -> Checkpoint:
    """Find the text decoder's weights; hardly more than headers is read.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
        config: Says which tensors are needed, and their shapes.

    Returns:
        Weights in the dtype of the checkpoint. Every other tensor is a copy of one of them, is redundant, which is
        checked, or is part of something that is left out.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt, a tensor is missing or has the wrong shape or
            dtype, or the checkpoint holds what the model does not know.
    """
    if adapter := [name for name in ADAPTER if (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: {adapter[0]} stands beside the model: {MERGE}, or remove it")
    entries = _entries(folder)
    shapes = tensor_shapes(config)
    form = architecture(config.architecture).huggingface
    stacked = {name: how for name in shapes if (how := form.stacked(config, name)) is not None}
    unread = functools.partial(form.unread, config)
    layout = Layout.of(folder, _joined(entries) if stacked else entries, shapes, form.renames, unread)
    latest: dict[str, tuple[int, torch.Tensor]] = {}
    weights: dict[str, Weight] = {}
    for name, shape in shapes.items():
        source, how = layout.sources[name], stacked.get(name)
        if how is None:
            weights[name] = _weight(source, entries[source], shape)
        elif source in entries:
            weights[name] = how.read(_weight(source, entries[source], how.shape(shape)), shape, latest)
        else:
            weights[name] = _open_mxfp4(source, entries, shape, how)
    for in_file, name in layout.redundant.items():
        check_redundant(name, _weight(in_file, entries[in_file], entries[in_file].shape), config)
    copies = {
        name: tuple(_weight(other, entries[other], shapes[name]) for other in others)
        for name, others in layout.copies.items()
    }
    lines = tuple(left_out_line(part, names) for part, names in layout.parts.items())
    return Checkpoint(weights=weights, copies=copies, left_out=lines)


def _joined(names: Iterable[str]) -> list[str]:
    """Names of tensors, where those of MXFP4's two parts are one."""
    present = set(names)
    pairs = {name.removesuffix(SCALES) for name in present if name.endswith(SCALES)}
    pairs = {name for name in pairs if name + BLOCKS in present and name not in present}
    scales = {name + SCALES for name in pairs}
    joined = {name + BLOCKS: name for name in pairs}
    return [joined.get(name, name) for name in names if name not in scales]


def _open_mxfp4(name: str, entries: Mapping[str, Entry], shape: tuple[int, ...], how: Stacked) -> Weight:
    origin = f"{entries[name + BLOCKS].path}: {name}"
    rows, columns = shape[0] // how.count, shape[1]
    if columns % 32:
        raise CheckpointError(
            f"{origin} is MXFP4, whose blocks of 32 do not divide {columns} columns: config.json belongs to another "
            "checkpoint"
        )
    parts = []
    for part, inner in ((BLOCKS, (columns // 32, 16)), (SCALES, (columns // 32,))):
        entry, wanted = entries[name + part], (how.count, rows, *inner)
        if entry.dtype != "U8" or entry.shape != wanted:
            raise CheckpointError(
                f"{origin}{part} is {entry.dtype} {list(entry.shape)}, expected U8 {list(wanted)}: config.json belongs "
                "to another checkpoint"
            )
        width = math.prod(inner)
        read_rows = functools.partial(_read_rows, dataclasses.replace(entry, shape=(0, width)), torch.uint8, width)
        parts.append(Weight(shape=(shape[0], width), dtype=torch.uint8, read_rows=read_rows, origin=origin))
    return how.read_mxfp4(parts[0], parts[1], shape, origin)


def open_weights(path: Path) -> dict[str, Weight]:
    """Every tensor of one file as it stands there, by the file's names.

    Raises:
        CheckpointError: If the file is truncated or corrupt, or a dtype is none that weights have.
    """
    return {name: _weight(name, entry, entry.shape) for name, entry in read_entries(path)[0].items()}


def tensor_names(folder: Path) -> tuple[str, ...]:
    """What a folder's tensors are called in the files.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt.
    """
    return tuple(_entries(folder))


def _entries(folder: Path) -> dict[str, Entry]:
    """Where every tensor of a folder stands, by its name in the files."""
    entries: dict[str, Entry] = {}
    for path in _files(folder):
        for name, entry in read_entries(path)[0].items():
            if name in entries:
                raise CheckpointError(
                    f"{folder}: {name} stands in {entries[name].path.name} and {path.name}: remove one"
                )
            entries[name] = entry
    if not (folder / SINGLE).is_file() and (wrong := _misplaced(folder, entries)):
        raise CheckpointError(f"{folder / INDEX}: {wrong}: index and shards belong to different checkpoints")
    return entries


def _misplaced(folder: Path, entries: Mapping[str, Entry]) -> str:
    """The first tensor that is not where the index says, in words; "" if all are."""
    places = _weight_map(folder / INDEX)
    for name, file in places.items():
        if name not in entries:
            return f"{file} lacks {name}"
        if entries[name].path.name != file:
            return f"{name} stands in {entries[name].path.name}, not in {file}"
    return next((f"{entry.path.name} holds {name} too" for name, entry in entries.items() if name not in places), "")


def revision(folder: Path) -> str:
    """Identity of a folder's weights without reading them: SHA-256 over every header and file size."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with _refused(path):
            digest.update(safetensors_file.header_bytes(path))
    return f"headers-sha256:{digest.hexdigest()}"


def _files(folder: Path) -> list[Path]:
    if is_file(folder / SINGLE, CheckpointError):
        return [folder / SINGLE]
    if not is_file(folder / INDEX, CheckpointError):
        raise CheckpointError(explain_missing(folder, SINGLE))
    names = sorted(set(_weight_map(folder / INDEX).values()))
    if missing := [name for name in names if not is_file(folder / name, CheckpointError)]:
        raise CheckpointError(f"{folder}: shards named by the index are missing: {', '.join(missing)}: fetch them")
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, as the index says."""
    places = (read_object(index, CheckpointError) or {}).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map must give the file of each tensor: fetch it again")
    if wrong := [file for file in places.values() if not _is_name(file)]:
        raise CheckpointError(f"{index}: {wrong[0]!r} is no name of a file beside it: fetch it again")
    return dict(places)


def _is_name(file: object) -> bool:
    """Whether a value is the name of a file in the same folder; systems take 255 bytes."""
    return isinstance(file, str) and bool(file) and file == Path(file).name and len(os.fsencode(file)) < 256


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where every tensor of a file stands, and the file's metadata.

    Raises:
        CheckpointError: If the file is truncated or corrupt.
    """
    with _refused(path):
        return safetensors_file.read_entries(path)


def read_bytes(entry: Entry, start: int, stop: int) -> torch.Tensor:
    """Bytes [start, stop) of a tensor, uint8.

    Raises:
        CheckpointError: If the file has become shorter.
    """
    buffer = torch.empty(stop - start, dtype=torch.uint8)
    with _refused(entry.path):
        safetensors_file.read_into(buffer.numpy(), entry, start)
    return buffer


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file, with its place and what to do."""
    try:
        yield
    except ValueError as error:
        if is_pointer(path):
            raise CheckpointError(f"{path}: {POINTER}") from error
        raise CheckpointError(f"{path}: {error}: fetch the file again") from error


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
    return Weight(
        shape=shape,
        dtype=dtype,
        read_rows=functools.partial(_read_rows, entry, dtype, row_bytes),
        origin=origin,
    )


def _read_rows(entry: Entry, dtype: torch.dtype, row_bytes: int, start: int, stop: int) -> torch.Tensor:
    return read_bytes(entry, start * row_bytes, stop * row_bytes).view(dtype).view(stop - start, *entry.shape[1:])
