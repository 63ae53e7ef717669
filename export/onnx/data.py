"""Where weights of an ONNX model stand: small ones in the model file, all others in one data file beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import BinaryIO

import torch
from onnx import TensorProto

from transom.formats.quantized import pack
from transom.graphs.weight import Weight, read_blocks

ALIGNMENT = 4096
"""Offset of every tensor in the data file, in bytes: a page, so that a runtime can map it."""

INLINE_BYTES = 1024
"""Tensors up to this size stay in the model file."""

ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.bool: TensorProto.BOOL,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a weight is to be written.

    Attributes:
        weight: What is written.
        offset: In the data file; None if it stays in the model file.
        transposed: Whether a matrix [N, K] is written as [K, N].
        packs: Whether it is codes of 4 bits, one a byte, which are written two a byte.
    """

    weight: Weight
    offset: int | None
    transposed: bool
    packs: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return self.weight.bytes // (2 if self.packs else 1)


class DataFile:
    """Places for weights, which are written together in the end.

    Args:
        file: The data file, open for writing.
        location: Its name.
        on_bytes: Called with the number of weight bytes written each time.
    """

    def __init__(self, file: BinaryIO, location: str, on_bytes: Callable[[int], None]) -> None:
        self._file, self._location, self._on_bytes, self._end = file, location, on_bytes, 0
        self._places: dict[str, _Place] = {}
        self._protos: dict[str, TensorProto] = {}

    def place(
        self,
        name: str,
        weight: Weight,
        element_type: int | None = None,
        *,
        transposed: bool = False,
        stacked: int | None = None,
    ) -> TensorProto:
        """Where a weight will be written, as the model file says it; see `Emitter.initializer`."""
        kind = element_type or ELEMENT_TYPES[weight.dtype]
        narrow, shape = kind in (TensorProto.INT4, TensorProto.UINT4), list(weight.shape)
        if transposed:
            shape.reverse()
        elif narrow:
            shape[-1] *= 2
        if stacked is not None:
            shape[:1] = [stacked, shape[0] // stacked]
        proto = TensorProto(name=name, data_type=kind, dims=shape)
        place = _Place(weight=weight, offset=None, transposed=transposed, packs=transposed and narrow)
        if place.size > INLINE_BYTES:
            offset = self._end + -self._end % ALIGNMENT
            place, self._end = dataclasses.replace(place, offset=offset), offset + place.size
            proto.data_location = TensorProto.EXTERNAL
            for key, entry in (("location", self._location), ("offset", offset), ("length", place.size)):
                proto.external_data.add(key=key, value=str(entry))
        self._protos[name], self._places[name] = proto, place
        return proto

    def write(self) -> None:
        """Write every weight to its place. What is transposed is written in strips, so that it is read only once."""
        inline = {name: bytearray(place.size) for name, place in self._places.items() if place.offset is None}
        for name, start, block in read_blocks({name: place.weight for name, place in self._places.items()}):
            place = self._places[name]
            if place.transposed:
                block = pack(block.T & 15, "int4") if place.packs else block.T
            raw = raw_bytes(block)
            # Rows of what is written, their bytes, and how many of those this block has.
            lines = place.weight.shape[1] if place.transposed and len(raw) < place.size else 1
            line, step = place.size // lines, len(raw) // lines
            first = line * start // place.weight.shape[0] if start else 0
            for index in range(lines):
                position, piece = index * line + first, raw[index * step : (index + 1) * step]
                if place.offset is None:
                    inline[name][position : position + len(piece)] = piece
                else:
                    self._file.seek(place.offset + position)
                    self._file.write(piece)
            self._on_bytes(len(raw))
        for name, content in inline.items():
            self._protos[name].raw_data = bytes(content)


def data_file(model_file: str) -> str:
    """The file that holds a model's weights."""
    return f"{model_file}.data"


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
