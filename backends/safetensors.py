"""Reads safetensors files straight into memory that runtimes take as it is. Needs no torch."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.errors import ArtifactError

ALIGNMENT = 64
"""Runtimes take buffers that start at such addresses without a copy."""

NUMPY_NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of dtypes in safetensors files, and in numpy with ml_dtypes."""


def aligned(count: int) -> NDArray[np.uint8]:
    """Bytes on an aligned address. Large arrays of numpy stand on huge pages where the system has them."""
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % ALIGNMENT
    return buffer[first : first + count]


def zeros(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Zeros on an aligned address. Their pages take no memory until they are written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % ALIGNMENT
    array: NDArray[Any] = buffer[first : first + size].view(dtype).reshape(shape)
    return array


class Reader:
    """An open safetensors file."""

    def __init__(self, file: io.FileIO, size: int) -> None:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
        self.entries: Mapping[str, dict[str, Any]] = {k: v for k, v in entries.items() if k != "__metadata__"}
        self._file, self._base = file, 8 + length

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, on an aligned address."""
        entry = self.entries[name]
        start, stop = entry["data_offsets"]
        buffer = aligned(stop - start)
        self._file.seek(self._base + start)
        done = 0
        while done < buffer.size:
            count = self._file.readinto(buffer[done:].data)
            if not count:
                raise ValueError("it ends too early")
            done += count
        return buffer.view(np.dtype(NUMPY_NAMES[entry["dtype"]])).reshape(entry["shape"])


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open a file; whatever is wrong with it becomes one clear error.

    Raises:
        ArtifactError: If the file is damaged, or does not hold what the block asks for.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            yield Reader(file, path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not hold the weights ({error}): export the model again") from error
