"""The head of a GGUF file: its metadata and where its tensors stand. Needs neither torch nor the `gguf` package.

The `gguf` package's own reader takes seconds over a vocabulary of 262,144 pieces and keeps the whole file mapped; this
one takes a fraction of that and lets go of the file.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path

import numpy as np

from transom.graphs.errors import CheckpointError

QUANT_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Types that we read: number in the file -> (name, values of a block, bytes of a block)."""

# Kinds of metadata values by their number; those of one number as numpy writes them.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor stands.

    Attributes:
        shape: Slowest axis first, as in PyTorch (the file holds it the other way round).
        quant_type: Number of the file's type; a key of `QUANT_TYPES` if we read it.
        offset: First byte, from the start of the file.
    """

    shape: tuple[int, ...]
    quant_type: int
    offset: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before the numbers.

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


def read_header(path: Path) -> Header:
    """Parse the head of a GGUF file, and check that the file is as long as the head says.

    Raises:
        CheckpointError: If the file is missing, truncated, corrupt, or not GGUF of version 2 or 3.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file: it must start with the bytes 'GGUF'")
            version = int.from_bytes(start[4:], "little")
            if version not in (2, 3):
                order = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
                raise CheckpointError(f"{path}: {order} GGUF is not supported: convert it to little-endian version 3")
            # The map lives no longer than this block, so that no page of the file counts as our memory later.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                header = _parse(path, view)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (struct.error, IndexError) as error:
        raise CheckpointError(f"{path}: cut off within its head: fetch it again") from error
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: its head is corrupt ({error}): fetch it again") from error
    for name, info in header.tensors.items():
        _, block_values, block_bytes = QUANT_TYPES.get(info.quant_type, ("", 1, 0))
        if (end := info.offset + math.prod(info.shape) // block_values * block_bytes) > header.size:
            raise CheckpointError(
                f"{path}: {header.size} bytes, but {name} ends at byte {end}: the file is truncated, fetch it again"
            )
    return header


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

    def strings(self, count: int) -> list[str]:
        # The vocabulary passes through here: local names, no calls.
        view, at, unpack, found = self.view, self.at, _U64.unpack_from, []
        for _ in range(count):
            (length,) = unpack(view, at)
            at += 8 + length
            found.append(view[at - length : at])
        if at > len(view):
            raise IndexError
        self.at = at
        return [raw.decode("utf-8") for raw in found]

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
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _parse(path: Path, view: mmap.mmap) -> Header:
    cursor = _Cursor(view)
    num_tensors, num_values = cursor.u64(), cursor.u64()
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.u64() for _ in range(cursor.u32()))[::-1]
        found.append((name, shape, cursor.u32(), cursor.u64()))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: TensorInfo(shape=shape, quant_type=quant_type, offset=start + offset)
        for name, shape, quant_type, offset in found
    }
    return Header(path=path, metadata=metadata, tensors=tensors, data_start=start, size=len(view))
