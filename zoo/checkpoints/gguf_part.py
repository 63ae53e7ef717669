"""The head of one GGUF file: its metadata and where its tensors stand. Needs neither torch nor the `gguf` package.

The `gguf` package's own reader takes seconds over a vocabulary of 262,144 pieces and keeps the whole file mapped; this
one takes a fraction of that and lets go of the file. Checks are llama.cpp's: names are unique, tensors follow each
other in the order of the head, each padded to the alignment.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path

import numpy as np

from transom.errors import CheckpointError
from transom.zoo.checkpoints.containers import POINTER, is_pointer
from transom.zoo.checkpoints.gguf_types import SIZED_TYPES, readable_types, type_name

# Kinds of metadata values by their number; those of one number as numpy writes them.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MAX_AXES = 4
_MAX_NAME = 63
"""Bytes that llama.cpp has for a tensor's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor stands.

    Attributes:
        path: The file that holds it.
        shape: Slowest axis first, as in PyTorch (the file holds it the other way round).
        quant_type: Number of the file's type; a key of `QUANT_TYPES` if we read it.
        offset: First byte, from the start of the file.
    """

    path: Path
    shape: tuple[int, ...]
    quant_type: int
    offset: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One file and what stands before its numbers.

    Attributes:
        path: The file.
        metadata: Scalars, strings, lists of strings, and numpy arrays of numbers.
        tensors: By name.
        data_start: Where the head ends and the tensors begin, in bytes.
        size: Of the file, in bytes.
    """

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    data_start: int
    size: int


def read_part(path: Path) -> Part:
    """Parse the head of a GGUF file, and check that the file is as long as the head says.

    Raises:
        CheckpointError: If the file is missing, truncated, corrupt, or not GGUF of version 2 or 3.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] != b"GGUF":
                if is_pointer(path):
                    raise CheckpointError(f"{path}: {POINTER}")
                raise CheckpointError(f"{path}: not a GGUF file: it must start with the bytes 'GGUF'")
            version = int.from_bytes(start[4:], "little")
            if version not in (2, 3):
                order = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
                raise CheckpointError(f"{path}: {order} GGUF is not supported: convert it to little-endian version 3")
            # The map lives no longer than this block, so that no page of the file counts as our memory later.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _parse(path, view)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (struct.error, IndexError) as error:
        raise CheckpointError(f"{path}: cut off within its head: fetch it again") from error
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: its head is corrupt ({error}): fetch it again") from error


class _Cursor:
    def __init__(self, view: mmap.mmap) -> None:
        self.view, self.at = view, 8

    def u32(self) -> int:
        self.at += 4
        return int(_U32.unpack_from(self.view, self.at - 4)[0])

    def u64(self) -> int:
        self.at += 8
        return int(_U64.unpack_from(self.view, self.at - 8)[0])

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.view):
            raise IndexError
        self.at += count
        return self.view[self.at - count : self.at]

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8")

    def name(self) -> str:
        """A key or a tensor's name; error messages quote it, so it must fit one line."""
        if not (name := self.string()) or not name.isprintable():
            raise ValueError(f"a name is {name[:60]!r}")
        return name

    def strings(self, count: int) -> list[str]:
        # The vocabulary passes through here: local names, no calls.
        view, at, unpack, pieces = self.view, self.at, _U64.unpack_from, []
        for _ in range(count):
            (length,) = unpack(view, at)
            at += 8 + length
            pieces.append(view[at - length : at])
        if at > len(view):
            raise IndexError
        self.at = at
        return [raw.decode("utf-8") for raw in pieces]

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.u32(), self.u64()
            return self.strings(count) if inner == _STRING else self.numbers(inner, count)
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(count * dtype.itemsize)
        # Any byte but zero is true, also one that numpy would not write.
        return np.frombuffer(raw, np.uint8) != 0 if kind == _BOOL else np.frombuffer(raw, dtype)


def _parse(path: Path, view: mmap.mmap) -> Part:
    cursor = _Cursor(view)
    num_tensors, num_values = cursor.u64(), cursor.u64()
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        if (key := cursor.name()) in metadata:
            raise ValueError(f"key {key} stands twice")
        metadata[key] = cursor.value(cursor.u32())
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        if (name := cursor.name()) in entries:
            raise ValueError(f"tensor {name} stands twice")
        if len(name.encode()) > _MAX_NAME:
            raise ValueError(f"tensor {name[:80]} has a name of more than {_MAX_NAME} bytes")
        if (axes := cursor.u32()) > _MAX_AXES:
            raise ValueError(f"tensor {name} has {axes} axes, at most {_MAX_AXES} are allowed")
        entries[name] = tuple(cursor.u64() for _ in range(axes))[::-1], cursor.u32(), cursor.u64()
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, (shape, quant_type, offset) in entries.items():
        if quant_type not in SIZED_TYPES:
            raise CheckpointError(
                f"{path}: {name} has quantisation type {type_name(quant_type)}: requantise the file to one of "
                f"{readable_types()}"
            )
        kind, block, block_bytes = SIZED_TYPES[quant_type]
        if (columns := shape[-1] if shape else 1) % block:
            raise CheckpointError(
                f"{path}: {name} is {kind}, whose blocks of {block} do not fit its rows of {columns}: convert it again"
            )
        if offset != expected:
            fault = "overlaps the tensor before it" if offset < expected else "leaves a gap before it"
            raise ValueError(f"{name} begins at byte {offset} of the tensors, expected {expected}: it {fault}")
        length = math.prod(shape) // block * block_bytes
        if (end := start + offset + length) > len(view):
            raise CheckpointError(
                f"{path}: {len(view)} bytes, but {name} ends at byte {end}: the file is truncated, fetch it again"
            )
        expected += -(-length // alignment) * alignment
        tensors[name] = TensorInfo(path=path, shape=shape, quant_type=quant_type, offset=start + offset)
    return Part(path=path, metadata=metadata, tensors=tensors, data_start=start, size=len(view))
