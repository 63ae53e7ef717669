"""Weights as recipes: a name for where the numbers are, read only when somebody writes or computes with them.

A 27B checkpoint must pass through tracing, passes and export without ever standing in memory. So a graph holds
`Weight` objects: shape, dtype and a function that reads a range of rows. Passes build new weights out of old ones
(`concat`, `map_rows`), which only composes functions; the exporter then streams rows to disk.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from transom.errors import CheckpointError, RangeError
from transom.formats.finite import is_finite, nonfinite_rows
from transom.formats.quantized import decode
from transom.formats.schemes import Number

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

ROWS_BYTES = 64 * 2**20
"""Upper bound, in bytes, on one block that `Weight.blocks` yields (a single row may exceed it)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lattice:
    """The codes behind a weight that was quantised before it reached us: `(code - zero_point) * scale`, exactly.

    Attributes:
        name: What the checkpoint calls the format, such as "Q5_0".
        number: What a code is; see `formats.schemes.Number`.
        bits: Bits that hold every code; an integer format may need fewer than its number has.
        block: Columns that share one scale.
        symmetric: Whether zero is the code in the middle, so that there are no zero points.
        scale_dtype: What every scale can be rounded to without a change; "bfloat16" ones are positive too.
        read_rows: `(start, stop) -> (codes [rows, K], scales float32 [rows, K / block], zero points)`. Symmetric
            integers are int8, with zero as 0, others uint8, with zero points uint8 [rows, K / block]; else None.
    """

    name: str
    number: Number
    bits: int
    block: int
    symmetric: bool
    read_rows: Callable[[int, int], Codes]
    scale_dtype: str = "float32"

    def with_block(self, block: int) -> Lattice:
        """The same codes in smaller blocks, with every scale repeated; `block` divides this lattice's."""
        if block == self.block:
            return self
        pieces = self.block // block

        def read_rows(start: int, stop: int) -> Codes:
            codes, scales, zeros = self.read_rows(start, stop)
            again = None if zeros is None else zeros.repeat_interleave(pieces, 1)
            return codes, scales.repeat_interleave(pieces, 1), again

        return dataclasses.replace(self, block=block, read_rows=read_rows)

    def reorder_rows(self, order: Sequence[int]) -> Lattice:
        """The same codes with rows reordered; see `Weight.reorder_rows`."""

        def read_rows(start: int, stop: int) -> Codes:
            low, high, index = _reordered(order, start, stop)
            codes, scales, zeros = self.read_rows(low, high)
            return codes[index], scales[index], None if zeros is None else zeros[index]

        return dataclasses.replace(self, read_rows=read_rows)

    def decode(self, codes: Codes) -> torch.Tensor:
        """What some rows of codes mean, float32 [rows, K]."""
        integers, scales, zeros = codes
        rows, blocks = scales.shape
        integers_RGC = integers.view(rows, blocks, -1)
        if integers.dtype == torch.int8:  # symmetric: zero is 0, not the middle code
            return (integers_RGC.float() * scales[..., None]).view(rows, -1)
        return decode(integers_RGC, scales, zeros, self.number).view(rows, -1)

    def refuse_nonfinite(self, origin: str, rows: int) -> Lattice:
        """The same codes; reading those that mean NaN or infinity raises `CheckpointError`.

        Args:
            origin: Where they come from.
            rows: How many there are.
        """

        def read_rows(start: int, stop: int) -> Codes:
            codes = self.read_rows(start, stop)
            if not self._is_finite(codes):
                step = max(1, ROWS_BYTES // max(1, 4 * codes[0].shape[1]))
                blocks = (self.read_rows(low, min(low + step, rows)) for low in range(0, rows, step))
                raise _nonfinite(f"{origin}, {self.name},", nonfinite_rows(map(self.decode, blocks)))
            return codes

        return dataclasses.replace(self, read_rows=read_rows)

    def _is_finite(self, codes: Codes) -> bool:
        integers, scales, _ = codes
        if not (is_finite(scales) and is_finite(integers)):
            return False
        # No code means more than 448, nor is a difference of two bytes larger.
        in_range = not scales.numel() or float(scales.abs().max()) < torch.finfo(torch.float32).max / 2**9
        return in_range or is_finite(self.decode(codes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor that is not in memory.

    Attributes:
        shape: Full shape. Axis 0 is the one that can be read in ranges.
        dtype: The dtype that reading yields.
        read_rows: `(start, stop) -> tensor [stop - start, *shape[1:]]` on the CPU. Never caches.
        origin: Where the numbers come from, for error messages and manifests.
        lattice: The codes that the numbers were made from, if the checkpoint holds such codes.
        parts: What it was stacked from, if it was; each may have a lattice of its own.
        exact: What it was before it was converted to another dtype, so that quantisation rounds only once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], torch.Tensor]
    origin: str
    lattice: Lattice | None = None
    parts: tuple[Weight, ...] = ()
    exact: Weight | None = None

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
            parts=tuple(whole for part in parts for whole in part.parts or (part,)),
        )

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
        return Weight(
            shape=(*self.shape[:1], *(self.shape[1:] if row_shape is None else row_shape)),
            dtype=dtype or self.dtype,
            read_rows=lambda start, stop: function(self.read_rows(start, stop)),
            origin=self.origin,
        )

    def reorder_rows(self, order: Sequence[int]) -> Weight:
        """The same rows, reordered alike within every group of as many as `order` lists; codes go along.

        Args:
            order: Row of the group that comes first, second and so on. Its length divides the number of rows.
        """

        def read_rows(start: int, stop: int) -> torch.Tensor:
            low, high, index = _reordered(order, start, stop)
            return self.read_rows(low, high)[index]

        return dataclasses.replace(self, read_rows=read_rows, lattice=self.lattice and self.lattice.reorder_rows(order))

    def refuse_nonfinite(self) -> Weight:
        """The same weight; reading rows, or codes, that are NaN or infinite raises `CheckpointError`.

        Each block is looked at as it is read, so nothing is read twice. The error names the rows of the whole tensor.
        """

        def read_rows(start: int, stop: int) -> torch.Tensor:
            rows = self.read_rows(start, stop)
            if not is_finite(rows):
                raise _nonfinite(self.origin, nonfinite_rows(self.blocks()))
            return rows

        lattice = self.lattice and self.lattice.refuse_nonfinite(self.origin, self.shape[0])
        return dataclasses.replace(self, read_rows=read_rows, lattice=lattice)

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

        lattice = self.lattice
        if lattice is not None:
            read_codes = lattice.read_rows

            def read_checked(start: int, stop: int) -> Codes:
                read_rows(start, stop)
                return read_codes(start, stop)

            lattice = dataclasses.replace(lattice, read_rows=read_checked)
        return dataclasses.replace(self, read_rows=read_rows, lattice=lattice)

    def to(self, dtype: torch.dtype) -> Weight:
        """The same numbers in another dtype; reading one that the dtype cannot hold raises `RangeError`."""
        if dtype == self.dtype:
            return self
        parts = tuple(part.to(dtype) for part in self.parts)
        return dataclasses.replace(
            self.map_rows(self._narrowed(dtype), dtype=dtype),
            lattice=self.lattice,
            parts=parts,
            exact=self.exact or self,
        )

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


def _reordered(order: Sequence[int], start: int, stop: int) -> tuple[int, int, torch.Tensor]:
    """Rows to read for the reordered rows [start, stop), and where each of these stands among them."""
    group = len(order)
    low, high = start // group * group, -(-stop // group) * group
    rows = torch.arange(start, stop)
    return low, high, rows // group * group + torch.tensor(order)[rows % group] - low


def _nonfinite(origin: str, rows: str) -> CheckpointError:
    return CheckpointError(
        f"{origin} holds numbers that are not finite in {rows}: fetch the checkpoint again or mend it"
    )
