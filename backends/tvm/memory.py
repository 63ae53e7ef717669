"""Memory on the addresses that kernels want, and weights that are read straight into it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.graphs.errors import ArtifactError

ALIGNMENT = 64

_DTYPES = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "I8": np.int8, "BOOL": np.bool_}


def zeros(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Zeros on an aligned address. Their pages take no memory until they are written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    found: NDArray[Any] = aligned(np.zeros(size + ALIGNMENT, np.uint8))[:size].view(dtype).reshape(shape)
    return found


def aligned(memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes of an array from its first aligned address on."""
    return memory[-memory.ctypes.data % ALIGNMENT :]


def read_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Weights of a safetensors file by name, each on an aligned address; the file is read once and not kept.

    Raises:
        ArtifactError: If it cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(length))
            size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            # Large arrays of numpy stand on huge pages where the system has them.
            held = aligned(np.empty(size + ALIGNMENT, np.uint8))[:size]
            done = 0
            while done < size:
                count = file.readinto(held[done:].data)
                if not count:
                    raise ValueError(f"it ends after {done} of {size} bytes")
                done += count
        return {name: _tensor(held, entry) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): export the model again") from error


def _tensor(held: NDArray[np.uint8], entry: dict[str, Any]) -> NDArray[Any]:
    low, high = entry["data_offsets"]
    raw = held[low:high]
    if low % ALIGNMENT:
        copy = zeros(raw.shape, np.uint8)
        copy[:] = raw
        raw = copy
    return raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
