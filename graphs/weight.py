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

ROWS_BYTES = 64 * 2**20
"""Upper bound, in bytes, on one block that `Weight.blocks` yields (a single row may exceed it)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lattice:
    """The integer codes behind a weight that was quantised before it reached us: `codes * scale`, exactly.

    Attributes:
        block: Columns that share one scale.
        read_rows: `(start, stop) -> (codes int8 [rows, K], scales float32 [rows, K / block])`.
    """

    block: int
    read_rows: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor that is not in memory.

    Attributes:
        shape: Full shape. Axis 0 is the one that can be read in ranges.
        dtype: The dtype that reading yields.
        read_rows: `(start, stop) -> tensor [stop - start, *shape[1:]]` on the CPU. Never caches.
        origin: Where the numbers come from, for error messages and manifests.
        lattice: The codes that the numbers were made from, if the checkpoint holds such codes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], torch.Tensor]
    origin: str
    lattice: Lattice | None = None

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

        def pieces(start: int, stop: int) -> Iterator[tuple[Weight, int, int]]:
            for part, low in zip(parts, starts, strict=False):
                if start < low + part.shape[0] and stop > low:
                    yield part, max(start - low, 0), min(stop - low, part.shape[0])

        def read_rows(start: int, stop: int) -> torch.Tensor:
            return torch.cat([part.read_rows(*span) for part, *span in pieces(start, stop)])

        def read_codes(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            found = [part.lattice.read_rows(*span) for part, *span in pieces(start, stop) if part.lattice]
            return torch.cat([codes for codes, _ in found]), torch.cat([scales for _, scales in found])

        grids = {part.lattice.block if part.lattice else None for part in parts}
        block = grids.pop() if len(grids) == 1 else None
        return Weight(
            shape=(starts[-1], *first.shape[1:]),
            dtype=first.dtype,
            read_rows=read_rows,
            origin=" + ".join(part.origin for part in parts),
            lattice=Lattice(block=block, read_rows=read_codes) if block else None,
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

    def to(self, dtype: torch.dtype) -> Weight:
        """The same numbers in another dtype."""
        if dtype == self.dtype:
            return self
        return dataclasses.replace(self.map_rows(lambda rows: rows.to(dtype), dtype=dtype), lattice=self.lattice)
