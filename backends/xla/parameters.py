"""The programs' parameters: how they stand in the file, and how in memory. Needs no torch.

The file is a safetensors file. Quantised weights stand in it as the graph has them (`formats.quantized`), and come to
memory as the programs take them (`export.xla.narrow`): integers as narrow as their codes, in the order of axes that
suits a TPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.safetensors import aligned, reading

WEIGHTS_FILE = "weights.safetensors"

_ROWS_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One argument of the programs.

    Attributes:
        dtype: In memory; a name of numpy or ml_dtypes, such as "bfloat16" or "int4".
        file_shape: Shape in the file, unpacked; its first axis is that of the file's tensor.
        axes: Order of those axes in memory.
        packed: Whether the file holds two codes a byte, the even one in the low half.
        middle: Subtracted from the file's codes, so that they become signed.
    """

    dtype: str
    file_shape: tuple[int, ...]
    axes: tuple[int, ...]
    packed: bool = False
    middle: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in memory."""
        return tuple(self.file_shape[axis] for axis in self.axes)


def read_parameters(path: Path, parameters: Mapping[str, Parameter], put: Any) -> dict[str, Any]:
    """Read all parameters, one after the other.

    Args:
        path: The safetensors file.
        parameters: What to read, by name.
        put: Makes a device array of a numpy array.

    Raises:
        ArtifactError: If the file is damaged or does not hold them.
    """
    import ml_dtypes  # noqa: F401 (teaches numpy bfloat16, narrow floats and 4-bit integers)

    with reading(path) as file:
        return {name: put(_in_memory(file.read(name), wanted)) for name, wanted in parameters.items()}


def _in_memory(stored: NDArray[Any], wanted: Parameter) -> NDArray[Any]:
    plain = wanted.axes == tuple(range(len(wanted.file_shape))) and not wanted.packed and not wanted.middle
    if not plain:
        return _arranged(stored, wanted)
    if stored.dtype != np.dtype(wanted.dtype):
        raise ValueError(f"numbers of {stored.dtype} in place of {wanted.dtype}")
    return stored.reshape(wanted.file_shape)


def _arranged(stored: NDArray[Any], wanted: Parameter) -> NDArray[Any]:
    """A tensor as the programs take it, converted by blocks of rows."""
    dtype = np.dtype(wanted.dtype)
    tensor = aligned(math.prod(wanted.shape) * dtype.itemsize).view(dtype).reshape(wanted.shape)
    by_row = tensor.transpose(np.argsort(wanted.axes))
    step = max(1, _ROWS_BYTES // max(1, stored[:1].nbytes))
    for start in range(0, len(stored), step):
        rows = stored[start : start + step].reshape(min(step, len(stored) - start), -1)
        if wanted.packed:
            pairs = np.stack((rows & 15, rows >> 4), -1)
            rows = pairs.reshape(len(rows), -1)[:, : math.prod(wanted.file_shape[1:])]
        if wanted.middle:
            rows = (rows - np.uint8(wanted.middle)).view(np.int8)
        elif wanted.packed and not wanted.dtype.startswith("uint"):
            rows = rows.view(dtype)  # the bits of floats
        by_row[start : start + step] = rows.reshape(len(rows), *wanted.file_shape[1:])
    return tensor
