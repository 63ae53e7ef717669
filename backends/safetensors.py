"""Tensors of safetensors files in memory that runtimes take as it is. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.errors import ArtifactError
from transom.safetensors_file import Entry, read_entries, read_into

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """The tensors of a safetensors file, by name."""

    entries: Mapping[str, Entry]

    def read(self, name: str) -> NDArray[Any]:
        """One tensor, on an aligned address."""
        entry = self.entries[name]
        buffer = aligned(entry.stop - entry.start)
        read_into(buffer, entry)
        return buffer.view(np.dtype(NUMPY_NAMES[entry.dtype])).reshape(entry.shape)


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open a file; whatever is wrong with it becomes one clear error.

    Raises:
        ArtifactError: If the file is damaged, or does not hold what the block asks for.
    """
    try:
        yield Reader(entries=read_entries(path)[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not hold the weights ({error}): export the model again") from error
