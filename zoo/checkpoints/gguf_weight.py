"""One tensor of a GGUF file as a weight that is read on demand."""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import numpy as np
import torch

from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.zoo.checkpoints.gguf_codes import read_codes
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_part import TensorInfo
from transom.zoo.checkpoints.gguf_types import QUANT_TYPES, readable_types, type_name


def gguf_package() -> ModuleType:
    """The `gguf` package, which dequantises.

    Raises:
        CheckpointError: If it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise CheckpointError("reading .gguf files needs the gguf package: pip install 'transom[gguf]'") from None


def open_weight(
    gguf: ModuleType, name: str, info: TensorInfo, shape: tuple[int, ...], stored: tuple[int, ...] | None = None
) -> Weight:
    """The tensor in float32, as it stands in the file; a symmetric integer type carries its codes.

    Args:
        gguf: The package.
        name: In the file.
        info: Where it stands.
        shape: What it must have; one axis at least.
        stored: What it must have in the file, where that is another shape of as many numbers.

    Raises:
        CheckpointError: If it has another shape or a type that we do not read.
    """
    origin = f"{info.path}: {name}"
    # llama.cpp knows no difference between a missing axis and one of length 1.
    expected = stored or shape
    padded = (1,) * (len(expected) - len(info.shape)) + info.shape
    further = len(padded) - len(expected)
    if padded[further:] != expected or any(axis != 1 for axis in padded[:further]):
        raise CheckpointError(
            f"{origin} has shape {list(info.shape)}, expected {list(expected)}: the file contradicts its metadata"
        )
    if info.quant_type not in QUANT_TYPES:
        raise CheckpointError(
            f"{origin} has quantisation type {type_name(info.quant_type)}: requantise the file to one of "
            f"{readable_types()}"
        )
    kind, block, _ = QUANT_TYPES[info.quant_type]
    if block > 1 and len(shape) == 1:
        raise CheckpointError(f"{origin} is {kind}, but vectors must be F32, F16 or BF16: convert the model again")
    read_bytes = functools.partial(_read_bytes, info, math.prod(shape[1:]))
    quant_type = gguf.GGMLQuantizationType(info.quant_type)

    def read_rows(start: int, stop: int) -> torch.Tensor:
        with np.errstate(invalid="ignore", over="ignore"):  # scales that are no numbers are refused with their rows
            values = gguf.quants.dequantize(read_bytes(start, stop), quant_type)
        return torch.from_numpy(values.reshape(stop - start, *shape[1:]))

    return Weight(
        shape=shape,
        dtype=torch.float32,
        read_rows=read_rows,
        origin=origin,
        encoded=read_codes(kind, shape, read_bytes) if len(shape) == 2 else None,
    )


def read_vector(header: Header, name: str) -> torch.Tensor | None:
    """A small tensor of a file, float32; None if the file has none of that name.

    Raises:
        CheckpointError: If it is damaged, or of a type that vectors do not have.
    """
    if (info := header.tensors.get(name)) is None:
        return None
    return open_weight(gguf_package(), name, info, (math.prod(info.shape),)).refuse_nonfinite().read()


def _read_bytes(info: TensorInfo, row_values: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) as they stand in the file, uint8 [rows, bytes of a row]."""
    _, block, block_bytes = QUANT_TYPES[info.quant_type]
    row_bytes = row_values // block * block_bytes
    count = (stop - start) * row_bytes
    raw = np.fromfile(info.path, np.uint8, count, offset=info.offset + start * row_bytes)
    if raw.size != count:
        raise CheckpointError(f"{info.path}: ended while it was read: it changed since it was opened")
    return raw.reshape(stop - start, row_bytes)
