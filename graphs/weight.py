"""Weights as recipes: a name for where the numbers are, read only when somebody writes or computes with them.

A 27B checkpoint must pass through tracing, passes and export without ever standing in memory. So a graph holds
`Weight` objects: shape, dtype and a function that reads a range of rows. Passes build new weights out of old ones
(`concat`, `map_rows`), which only composes functions; the exporter then streams rows to disk.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from transom.errors import CheckpointError, RangeError
from transom.formats.finite import is_finite, nonfinite_rows
from transom.formats.quantized import pack
from transom.formats.rounding import FLOAT8
from transom.formats.schemes import BITS
from transom.graphs.encoded import Codes, Encoded, nonfinite, reordered

ROWS_BYTES = 64 * 2**20
"""Upper bound, in bytes, on one block that `Weight.blocks` yields (a single row may exceed it)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor that is not in memory.

    Attributes:
        shape: Full shape. Axis 0 is the one that can be read in ranges.
        dtype: The dtype that reading yields.
        read_rows: `(start, stop) -> tensor [stop - start, *shape[1:]]` on the CPU. Never caches.
        origin: Where the numbers come from, for error messages and manifests.
        encoded: The codes that the numbers were made from, if the checkpoint holds such codes.
        exact: What it was before it was converted to another dtype, so that quantisation rounds only once.
        part_of: The encoded matrix whose codes, scales, zero points or offsets it is, if it is one of those.
        pick: `codes of some rows -> those rows of the part`; see `read_blocks`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], torch.Tensor]
    origin: str
    encoded: Encoded | None = None
    exact: Weight | None = None
    part_of: Encoded | None = None
    pick: Callable[[Codes], torch.Tensor] | None = None

    @staticmethod
    def of(tensor: torch.Tensor, origin: str = "memory") -> Weight:
        """Wrap a tensor that is in memory already."""
        return Weight(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            read_rows=lambda start, stop: tensor[start:stop] if tensor.dim() else tensor,
            origin=origin,
        )

    @staticmethod
    def concat(parts: Sequence[Weight]) -> Weight:
        """Stack weights along axis 0. All parts share the dtype and the trailing shape."""
        first = parts[0]
        if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype for part in parts):
            raise ValueError(f"cannot stack {[(p.shape, p.dtype) for p in parts]} along axis 0")
        starts = list(itertools.accumulate((part.shape[0] for part in parts), initial=0))

        def read_rows(start: int, stop: int) -> torch.Tensor:
            return torch.cat(
                [
                    part.read_rows(max(start - low, 0), min(stop - low, part.shape[0]))
                    for part, low in zip(parts, starts, strict=False)
                    if start < low + part.shape[0] and stop > low
                ]
            )

        return Weight(
            shape=(starts[-1], *first.shape[1:]),
            dtype=first.dtype,
            read_rows=read_rows,
            origin=" + ".join(part.origin for part in parts),
        )

    @staticmethod
    def parts_of(encoded: Encoded, origin: str) -> tuple[Weight, Weight, Weight | None]:
        """Codes, scales and zero points or offsets, if it has any, of an encoded matrix, as `formats.quantized` lays
        them out.
        """
        (rows, columns), format, bits = encoded.shape, encoded.format, BITS[encoded.format]
        blocks, middle = columns // encoded.block, 2 ** (bits - 1)

        def part(shape: tuple[int, ...], dtype: torch.dtype, pick: Callable[[Codes], torch.Tensor]) -> Weight:
            return Weight(
                shape=(rows, *shape),
                dtype=dtype,
                read_rows=lambda start, stop: pick(encoded.read_rows(start, stop)),
                origin=origin,
                part_of=encoded,
                pick=pick,
            )

        def packed(parts: Codes) -> torch.Tensor:
            codes = parts[0]
            if codes.dtype == torch.int8:
                codes = codes.view(torch.uint8) + middle
            return pack(codes.view(len(codes), blocks, -1), format)

        def stored_zeros(parts: Codes) -> torch.Tensor:
            assert parts[2] is not None
            return parts[2] if encoded.has_offsets else pack(parts[2], format)

        code_dtype = FLOAT8 if format == "float8_e4m3fn" else torch.uint8
        codes = part((blocks, encoded.block * bits // 8), code_dtype, packed)
        scales = part((blocks,), torch.float32, lambda parts: parts[1])
        if encoded.zeros_name is None:
            return codes, scales, None
        width, dtype = (blocks, torch.float32) if encoded.has_offsets else (-(-blocks * bits // 8), torch.uint8)
        return codes, scales, part((width,), dtype, stored_zeros)

    @property
    def bytes(self) -> int:
        """Size in bytes once read."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Read the whole tensor."""
        return self.read_rows(0, self.shape[0] if self.shape else 1)

    def blocks(self, limit: int = ROWS_BYTES) -> Iterator[torch.Tensor]:
        """Yield the tensor in row order, in blocks of at most `limit` bytes."""
        if not self.shape:
            yield self.read()
            return
        per_row = max(1, self.bytes // max(1, self.shape[0]))
        step = max(1, limit // per_row)
        for start in range(0, self.shape[0], step):
            yield self.read_rows(start, min(start + step, self.shape[0]))

    def map_rows(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        *,
        row_shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Weight:
        """Apply a function that treats every row by itself.

        Args:
            function: `[rows, *shape[1:]] -> [rows, *row_shape]`.
            row_shape: Trailing shape of the result; by default unchanged.
            dtype: Dtype of the result; by default unchanged.
        """
        pick = self.pick
        return Weight(
            shape=(*self.shape[:1], *(self.shape[1:] if row_shape is None else row_shape)),
            dtype=dtype or self.dtype,
            read_rows=lambda start, stop: function(self.read_rows(start, stop)),
            origin=self.origin,
            part_of=self.part_of,
            pick=None if pick is None else lambda codes: function(pick(codes)),
        )

    def reorder_rows(self, order: Sequence[int]) -> Weight:
        """The same rows, reordered alike within every group of as many as `order` lists; codes go along.

        Args:
            order: Row of the group that comes first, second and so on. Its length divides the number of rows.
        """

        def read_rows(start: int, stop: int) -> torch.Tensor:
            low, high, index = reordered(order, start, stop)
            return self.read_rows(low, high)[index]

        return dataclasses.replace(self, read_rows=read_rows, encoded=self.encoded and self.encoded.reorder_rows(order))

    def slice_rows(self, start: int, stop: int) -> Weight:
        """Rows [start, stop) as a weight of their own, without codes."""
        return Weight(
            shape=(stop - start, *self.shape[1:]),
            dtype=self.dtype,
            read_rows=lambda low, high: self.read_rows(start + low, start + high),
            origin=self.origin,
        )

    def refuse_nonfinite(self) -> Weight:
        """The same weight; reading rows, or codes, that are NaN or infinite raises `CheckpointError`.

        Each block is looked at as it is read, so nothing is read twice. The error names the rows of the whole tensor.
        """

        def read_rows(start: int, stop: int) -> torch.Tensor:
            rows = self.read_rows(start, stop)
            if not is_finite(rows):
                raise nonfinite(self.origin, nonfinite_rows(self.blocks()))
            return rows

        encoded = self.encoded and self.encoded.refuse_nonfinite(self.origin)
        return dataclasses.replace(self, read_rows=read_rows, encoded=encoded)

    def refuse_difference(self, copy: Weight) -> Weight:
        """The same weight; reading rows, or their codes, in which a copy of it differs raises `CheckpointError`.

        Args:
            copy: Of the same shape, and perhaps of another dtype.
        """

        def read_rows(start: int, stop: int) -> torch.Tensor:
            rows = self.read_rows(start, stop)
            step = max(1, ROWS_BYTES // max(1, 4 * math.prod(self.shape[1:])))
            for low in range(start, stop, step):
                high = min(low + step, stop)
                if not torch.equal(rows[low - start : high - start].float(), copy.read_rows(low, high).float()):
                    name = self.origin.rpartition(": ")[2]
                    raise CheckpointError(
                        f"{copy.origin} differs from {name}, whose copy it should be, in rows {low} to {high - 1}: "
                        "models in which they differ are not supported"
                    )
            return rows

        encoded = self.encoded
        if encoded is not None:
            read_codes = encoded.read_rows

            def read_checked(start: int, stop: int) -> Codes:
                read_rows(start, stop)
                return read_codes(start, stop)

            encoded = dataclasses.replace(encoded, read_rows=read_checked)
        return dataclasses.replace(self, read_rows=read_rows, encoded=encoded)

    def to(self, dtype: torch.dtype) -> Weight:
        """The same numbers in another dtype; reading one that the dtype cannot hold raises `RangeError`."""
        if dtype == self.dtype:
            return self
        narrow = self.map_rows(self._narrowed(dtype), dtype=dtype)
        return dataclasses.replace(narrow, encoded=self.encoded, exact=self.exact or self)

    def _narrowed(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        def convert(rows: torch.Tensor) -> torch.Tensor:
            narrow = rows.to(dtype)
            if not is_finite(narrow) and is_finite(rows):
                name, holds = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
                where = nonfinite_rows(block.to(dtype) for block in self.blocks())
                raise RangeError(
                    f"{self.origin} reaches {float(rows.abs().max()):.4g} in {where}, of which {name} holds "
                    f"{holds:.4g}: compute in float32"
                )
            return narrow

        return convert


Key = TypeVar("Key")


def read_blocks(weights: Mapping[Key, Weight]) -> Iterator[tuple[Key, int, torch.Tensor]]:
    """All rows of some weights, in blocks: which weight, the first row of the block, and the block.

    Parts of one encoded matrix come from one pass over it, so that its rows are read and rounded once.
    """
    parts: dict[int, list[Key]] = {}
    for key, weight in weights.items():
        if weight.part_of is not None:
            parts.setdefault(id(weight.part_of), []).append(key)
    for key, weight in weights.items():
        if weight.part_of is None:
            start = 0
            for block in weight.blocks():
                yield key, start, block
                start += len(block) if block.dim() else 1
            continue
        keys = parts.pop(id(weight.part_of), ())
        for start, codes in weight.part_of.blocks() if keys else ():
            for part in keys:
                pick = weights[part].pick
                assert pick is not None
                yield part, start, pick(codes)


def read_all(weights: Mapping[Key, Weight]) -> dict[Key, torch.Tensor]:
    """Weights as whole tensors; see `read_blocks`."""
    tensors = {
        key: weight.read() if weight.part_of is None else torch.empty(weight.shape, dtype=weight.dtype)
        for key, weight in weights.items()
    }
    for key, start, block in read_blocks({key: weights[key] for key in weights if weights[key].part_of is not None}):
        tensors[key][start : start + len(block)] = block
    return tensors
