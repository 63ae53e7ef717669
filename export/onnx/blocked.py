"""Quantised matrices in the layout of DequantizeLinear and MatMul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto

from transom.errors import QuantizationError
from transom.export.onnx.emitter import Emitter
from transom.export.onnx.offsets import is_offsets
from transom.formats.quantized import block_of, unpack
from transom.formats.schemes import BITS
from transom.graphs.node import Node
from transom.graphs.weight import Weight


class Blocked:
    """A quantised matrix as DequantizeLinear takes it for MatMul: codes [K, N], scales and zero points [K / block, N].

    Runtimes fuse this layout into their quantised products; they do not fuse a transposed one.

    Args:
        emitter: Of the export.
        parts: Codes, scales, zero points, offsets or None, and number, as in `graphs.ops`.
        convert_scales: Converts the scales to the dtype in which the runtime takes them; by default they stay float32.
    """

    def __init__(
        self, emitter: Emitter, parts: Any, convert_scales: Callable[[Weight], Weight] = lambda scales: scales
    ) -> None:
        self._emitter, self._convert_scales = emitter, convert_scales
        self._codes, self._scales, zeros, self.format = parts
        # Offsets are added to the product: see `offsets`.
        self._zero_points = None if is_offsets(zeros) else zeros
        self.rows, self.blocks, _ = (int(size) for size in self._codes.meta["val"].shape)
        self.bits, self.block = BITS[self.format], block_of(self._codes.meta["val"], self.format)

    def inputs(self) -> list[str]:
        """Names of codes, scales and, if the blocks have them, zero points."""
        scales = self._emitter.graph.weight_of(self._scales)
        assert scales is not None
        names = [
            self._integers(self._codes, self.blocks * self.block),
            self._emitter.initializer(f"{scales[0]}.transposed", self._convert_scales(scales[1]), transposed=True),
        ]
        if self._zero_points is not None:
            names.append(self._integers(self._zero_points, self.blocks))
        return names

    def _integers(self, node: Node, columns: int) -> str:
        """Write codes [N, columns] as [columns, N]; without zero points they become signed."""
        named_weight = self._emitter.graph.weight_of(node)
        assert named_weight is not None
        name, weight = named_weight
        signed, bits, format = self._zero_points is None, self.bits, self.format

        def rows(packed: torch.Tensor) -> torch.Tensor:
            codes = unpack(packed.flatten(1), format, columns)
            # Subtracting the middle code, in two's complement.
            return codes - 2 ** (bits - 1) if signed else codes

        if bits == 4 and self.rows % 2:
            raise QuantizationError(f"{name}: an odd number of outputs does not pack into bytes of two codes: use int8")
        kinds = {(4, True): TensorProto.INT4, (4, False): TensorProto.UINT4, (8, True): TensorProto.INT8}
        kind = kinds.get((bits, signed), TensorProto.UINT8)
        plain = weight.map_rows(rows, row_shape=(columns,))
        return self._emitter.initializer(f"{name}.transposed", plain, kind, transposed=True)
