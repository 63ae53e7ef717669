"""Matrices of experts, which files hold on an axis of their own, and modules one below the other.

Files of some families hold them transposed, gates and ups by turns, or as MXFP4: 4-bit floats (E2M1), two a byte, with
a power of two for each 32 columns (`formats.float4`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from transom.formats import float4
from transom.formats.quantized import unpack
from transom.graphs.encoded import Codes, Encoded
from transom.graphs.weight import Weight

BLOCKS, SCALES = "_blocks", "_scales"
"""What stands behind a name of MXFP4's two parts."""

_BLOCK = 32


def side_by_side(parts: Sequence[Weight], count: int) -> Weight:
    """Matrices of the same experts as one: the first one's rows of an expert, then the second one's.

    Args:
        parts: Of one shape.
        count: Experts.
    """
    rows = parts[0].shape[0] // count

    def pieces(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Which part, and which rows of it."""
        while start < stop:
            expert, row = divmod(start, len(parts) * rows)
            part, row = divmod(row, rows)
            taken = min(stop - start, rows - row)
            yield part, expert * rows + row, expert * rows + row + taken
            start += taken

    def read_rows(start: int, stop: int) -> torch.Tensor:
        return torch.cat([parts[part].read_rows(low, high) for part, low, high in pieces(start, stop)])

    encoded = [part.encoded for part in parts if part.encoded is not None]
    shape, joint = (len(parts) * parts[0].shape[0], *parts[0].shape[1:]), None
    if len(encoded) == len(parts) and len({(one.name, one.block) for one in encoded}) == 1:

        def read_codes(start: int, stop: int) -> Codes:
            read = [encoded[part].read_rows(low, high) for part, low, high in pieces(start, stop)]
            codes, scales, zeros = zip(*read, strict=True)
            return torch.cat(codes), torch.cat(scales), None if encoded[0].zeros_name is None else torch.cat(zeros)

        joint = dataclasses.replace(encoded[0], shape=shape, read_rows=read_codes)
    return Weight(
        shape=shape,
        dtype=parts[0].dtype,
        read_rows=read_rows,
        origin=" + ".join(part.origin for part in parts),
        encoded=joint,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked:
    """How a file holds the matrices, or biases, of all experts.

    Attributes:
        count: Experts.
        transposed: Whether rows of a matrix are columns in the file.
        by_turns: Whether every gate is followed by its up; in modules, the gates come first.
    """

    count: int
    transposed: bool = False
    by_turns: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file of what the module holds as [count * rows, ...]."""
        rows = shape[0] // self.count
        return (self.count, *shape[1:], rows) if self.transposed else (self.count, rows, *shape[1:])

    def read(self, stored: Weight, shape: tuple[int, ...], latest: dict[str, tuple[int, torch.Tensor]]) -> Weight:
        """The module's weight of a file's.

        Args:
            stored: As the file has it.
            shape: In the module.
            latest: Holds the expert that was read last, as rows of a transposed one are no bytes of their own. One
                for all weights of a file.
        """
        rows = shape[0] // self.count

        def expert(index: int) -> torch.Tensor:
            if (known := latest.get(stored.origin)) is not None and known[0] == index:
                return known[1]
            matrix = stored.read_rows(index, index + 1)[0]
            matrix = (matrix.T if self.transposed else matrix)[self._order(rows)]
            latest.clear()
            latest[stored.origin] = index, matrix
            return matrix

        def read_rows(start: int, stop: int) -> torch.Tensor:
            pieces = [
                expert(index)[max(start - index * rows, 0) : stop - index * rows]
                for index in range(start // rows, -(-stop // rows))
            ]
            return torch.cat(pieces) if pieces else stored.read_rows(0, 0).reshape(0, *shape[1:])

        return Weight(shape=shape, dtype=stored.dtype, read_rows=read_rows, origin=stored.origin)

    def write(self, weight: Weight) -> Weight:
        """The file's weight of the module's: undoes `read`."""
        rows = weight.shape[0] // self.count
        back = torch.argsort(self._order(rows))

        def read_rows(start: int, stop: int) -> torch.Tensor:
            matrices = weight.read_rows(start * rows, stop * rows).view(stop - start, rows, *weight.shape[1:])
            matrices = matrices[:, back]
            return matrices.transpose(1, 2).contiguous() if self.transposed else matrices

        return Weight(shape=self.shape(weight.shape), dtype=weight.dtype, read_rows=read_rows, origin=weight.origin)

    def read_mxfp4(self, blocks: Weight, scales: Weight, shape: tuple[int, ...], origin: str) -> Weight:
        """The module's weight, float32, of MXFP4, whose parts are never transposed; it carries its codes.

        Args:
            blocks: Two codes a byte, the even column in the low half, uint8 [rows, columns / 2].
            scales: Exponents, uint8 [rows, columns / 32].
            shape: In the module.
            origin: Of the weight, for errors.
        """

        def read_rows(start: int, stop: int) -> Codes:
            packed, exponents = blocks.read_rows(start, stop), scales.read_rows(start, stop)
            return unpack(packed, "float4_e2m1fn", shape[1]), float4.scales_of(exponents), None

        encoded = Encoded(
            name="MXFP4",
            shape=shape,
            format="float4_e2m1fn",
            bits=4,
            block=_BLOCK,
            symmetric=True,
            scale_dtype="float8_e8m0fnu",
            read_rows=read_rows,
        )
        weight = Weight(
            shape=shape,
            dtype=torch.float32,
            read_rows=lambda start, stop: encoded.decode(encoded.read_rows(start, stop)),
            origin=origin,
            encoded=encoded,
        )
        return weight.reorder_rows(tuple(self._order(shape[0] // self.count).tolist())) if self.by_turns else weight

    def _order(self, rows: int) -> torch.Tensor:
        """Row of the file of every row of the module's, in one expert."""
        return torch.arange(rows).view(-1, 2).T.flatten() if self.by_turns else torch.arange(rows)
