"""The programs' parameters: how they stand in the file, and how in memory. Needs no torch.

The file is a safetensors file. Quantised weights stand in it as the graph has them (`graphs.quantized`), and come to
memory as the programs take them (`export.xla.narrow`): integers as narrow as their codes, in the order of axes that
suits a TPU.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.graphs.errors import ArtifactError

WEIGHTS_FILE = "weights.safetensors"

NUMPY_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "I8": "int8", "U8": "uint8"}
NUMPY_NAMES |= {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn"}
"""Names of dtypes in safetensors files and in numpy with ml_dtypes."""

_ALIGNMENT = 64
"""XLA takes buffers that start at such addresses as they are, without a copy."""

_ROWS_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One argument of the programs.

    Attributes:
        dtype: In memory; a name of numpy or ml_dtypes, such as "bfloat16" or "int4".
        held: Shape in the file, unpacked; its first axis is that of the file's tensor.
        axes: Order of those axes in memory.
        packed: Whether the file holds two codes a byte, the even one in the low half.
        middle: Subtracted from the file's codes, so that they become signed.
    """

    dtype: str
    held: tuple[int, ...]
    axes: tuple[int, ...]
    packed: bool = False
    middle: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in memory."""
        return tuple(self.held[axis] for axis in self.axes)


def read_parameters(path: Path, parameters: Mapping[str, Parameter], put: Any) -> dict[str, Any]:
    """Read all parameters, one after the other.

    Args:
        path: The safetensors file.
        parameters: What to read, by name.
        put: Makes a device array of a numpy array.

    Raises:
        ArtifactError: If the file is damaged or does not hold them.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            header, base = _header(file, path.stat().st_size)
            return {name: put(_read(file, base, header[name], wanted)) for name, wanted in parameters.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not hold the weights ({error}): export the model again") from error


def _header(file: io.FileIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    return json.loads(file.read(length)), 8 + length


def _read(file: io.FileIO, base: int, entry: Mapping[str, Any], wanted: Parameter) -> NDArray[Any]:
    import ml_dtypes  # noqa: F401 (teaches numpy bfloat16 and the 4-bit integers)

    start, stop = entry["data_offsets"]
    buffer = _aligned(stop - start)
    file.seek(base + start)
    done = 0
    while done < buffer.size:
        count = file.readinto(buffer.data[done:])
        if not count:
            raise ValueError("the file ends too early")
        done += count
    held = buffer.view(np.dtype(NUMPY_NAMES[entry["dtype"]])).reshape(entry["shape"])
    plain = wanted.axes == tuple(range(len(wanted.held))) and not wanted.packed and not wanted.middle
    if not plain:
        return _arranged(held, wanted)
    if held.dtype != np.dtype(wanted.dtype):
        raise ValueError(f"numbers of {held.dtype} in place of {wanted.dtype}")
    return held.reshape(wanted.held)


def _arranged(held: NDArray[Any], wanted: Parameter) -> NDArray[Any]:
    """A tensor as the programs take it, converted by blocks of rows."""
    dtype = np.dtype(wanted.dtype)
    found = _aligned(math.prod(wanted.shape) * dtype.itemsize).view(dtype).reshape(wanted.shape)
    by_row = found.transpose(np.argsort(wanted.axes))
    step = max(1, _ROWS_BYTES // max(1, held[:1].nbytes))
    for start in range(0, len(held), step):
        rows = held[start : start + step].reshape(min(step, len(held) - start), -1)
        if wanted.packed:
            pairs = np.stack((rows & 15, rows >> 4), -1)
            rows = pairs.reshape(len(rows), -1)[:, : math.prod(wanted.held[1:])]
        if wanted.middle:
            rows = (rows - np.uint8(wanted.middle)).view(np.int8)
        by_row[start : start + step] = rows.reshape(len(rows), *wanted.held[1:])
    return found


def _aligned(count: int) -> NDArray[np.uint8]:
    buffer = np.empty(count + _ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % _ALIGNMENT
    return buffer[first : first + count]
