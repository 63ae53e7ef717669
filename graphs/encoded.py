"""`Encoded`: a matrix as codes, scales and zero points, which one pass over its rows yields together.

Rows are independent, so stacked matrices are stacked codes: every matrix is encoded by itself, under its own name, and
targets that want one matrix for several (queries, keys and values) stack what was encoded.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from transom.errors import CheckpointError
from transom.formats import float4
from transom.formats.finite import is_finite, nonfinite_rows
from transom.formats.quantized import decode
from transom.formats.rounding import Rounded
from transom.formats.schemes import Format, QuantSpec

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""(codes [rows, K], scales float32 [rows, K / block], zeros) of some rows. Codes of symmetric integers are int8, with
the middle code as 0, and perhaps with offsets float32 [rows, K / block]; other integers are uint8, with zero points
uint8 [rows, K / block]; floats are their own dtype, those of SFP8 and of 4 bits are uint8, a code each."""

ROUNDED_NUMBERS = 2**18
"""Numbers encoded at a time: 1 MiB of float32 stays in a core's cache, which made rounding 3 times faster."""

_PIECES = 64
"""Pieces of `ROUNDED_NUMBERS` in a block that `Encoded.blocks` yields: 16 MiB of codes."""


def rows_at_once(columns: int) -> int:
    """Rows of a matrix that are encoded at a time."""
    return max(1, ROUNDED_NUMBERS // columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """Codes of a matrix [R, K]: they mean `(code - zero point) * scale + offset`, exactly.

    Attributes:
        name: What the format is called, such as "Q5_0".
        shape: (R, K).
        format: What a code is; see `formats.schemes.Format`.
        bits: Bits that hold every code; an integer format may need fewer than its number has.
        block: Columns that share one scale.
        symmetric: Whether zero is the code in the middle, so that there are no zero points.
        scale_dtype: What every scale can be rounded to without a change; "bfloat16" ones are positive too.
        read_rows: `(start, stop) -> codes of those rows`. Never caches.
        has_offsets: Whether there are offsets, which are what the code in the middle means.
        group: Rows that were reordered among themselves: whole groups are read once, and parts of one twice.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    bits: int
    block: int
    symmetric: bool
    read_rows: Callable[[int, int], Codes]
    scale_dtype: str = "float32"
    has_offsets: bool = False
    group: int = 1

    @staticmethod
    def of(spec: QuantSpec, shape: tuple[int, ...], read_rows: Callable[[int, int], Codes]) -> Encoded:
        """Codes of a spec's stored blocks."""
        return Encoded(
            name=spec.describe(),
            shape=shape,
            format=spec.format,
            bits=spec.bits,
            block=spec.stored_block(shape[1]),
            symmetric=spec.symmetric,
            scale_dtype=spec.scale_dtype,
            has_offsets=spec.has_offsets,
            read_rows=read_rows,
        )

    @staticmethod
    def stack(parts: Sequence[Encoded]) -> Encoded | None:
        """Codes of matrices one below the other, none of them changed; None if no format holds them all."""
        first, columns = parts[0], parts[0].shape[1]
        kinds = {(part.is_integer or part.format, part.symmetric, part.has_offsets, part.shape[1]) for part in parts}
        if len(kinds) > 1:
            return None
        parts = [part.with_block(math.gcd(*(part.block for part in parts))) for part in parts]
        starts = list(itertools.accumulate((part.shape[0] for part in parts), initial=0))

        def read_rows(start: int, stop: int) -> Codes:
            pieces = [
                part.read_rows(max(start - low, 0), min(stop, high) - low)
                for part, (low, high) in zip(parts, itertools.pairwise(starts), strict=True)
                if start < high and stop > low
            ]
            codes, scales, zeros = zip(*pieces, strict=True)
            return torch.cat(codes), torch.cat(scales), None if first.zeros_name is None else torch.cat(zeros)

        return Encoded(
            name=" + ".join(dict.fromkeys(part.name for part in parts)),
            shape=(starts[-1], columns),
            format="int8" if any(part.format == "int8" for part in parts) else first.format,
            bits=max(part.bits for part in parts),
            block=parts[0].block,
            symmetric=first.symmetric,
            scale_dtype=first.scale_dtype if len({part.scale_dtype for part in parts}) == 1 else "float32",
            has_offsets=first.has_offsets,
            read_rows=read_rows,
        )

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers."""
        return self.format in ("int4", "int8")

    @property
    def zeros_name(self) -> str | None:
        """What blocks have beside codes and scales: "zero_points" or "offsets", or nothing."""
        if self.has_offsets:
            return "offsets"
        return None if self.symmetric else "zero_points"

    def blocks(self) -> Iterator[tuple[int, Codes]]:
        """All rows in order, in blocks of whole groups: the first row of each, an even one, and its codes."""
        step, group = _PIECES * rows_at_once(self.shape[1]), math.lcm(self.group, 2)
        step = max(1, step // group) * group
        for start in range(0, self.shape[0], step):
            yield start, self.read_rows(start, min(start + step, self.shape[0]))

    def with_block(self, block: int) -> Encoded:
        """The same codes in smaller blocks, with every scale repeated; `block` divides this one's."""
        if block == self.block:
            return self
        pieces = self.block // block

        def read_rows(start: int, stop: int) -> Codes:
            codes, scales, zeros = self.read_rows(start, stop)
            again = None if zeros is None else zeros.repeat_interleave(pieces, 1)
            return codes, scales.repeat_interleave(pieces, 1), again

        return dataclasses.replace(self, block=block, read_rows=read_rows)

    def as_integers(self) -> Encoded:
        """Codes of 4-bit floats as integers, twice as large, of scales half as large; any others as they are."""
        if self.format != "float4_e2m1fn":
            return self

        def read_rows(start: int, stop: int) -> Codes:
            codes, scales, _ = self.read_rows(start, stop)
            return float4.doubled(codes), scales / 2, None

        return dataclasses.replace(self, format="int8", bits=5, scale_dtype="float32", read_rows=read_rows)

    def reorder_rows(self, order: Sequence[int]) -> Encoded:
        """The same codes with rows reordered; see `Weight.reorder_rows`."""

        def read_rows(start: int, stop: int) -> Codes:
            low, high, index = reordered(order, start, stop)
            codes, scales, zeros = self.read_rows(low, high)
            return codes[index], scales[index], None if zeros is None else zeros[index]

        return dataclasses.replace(self, read_rows=read_rows, group=math.lcm(self.group, len(order)))

    def decode(self, codes: Codes) -> torch.Tensor:
        """What some rows of codes mean, float32 [rows, K]."""
        integers, scales, zeros = codes
        rows, blocks = scales.shape
        integers_RGC = integers.view(rows, blocks, -1)
        if integers.dtype == torch.int8:  # symmetric: the middle code is 0
            values = integers_RGC.float() * scales[..., None]
            return (values if zeros is None else values.add_(zeros[..., None])).view(rows, -1)
        return decode(integers_RGC, scales, zeros, self.format).view(rows, -1)

    def dequantized(self) -> torch.Tensor:
        """What all codes mean, float32 [R, K]."""
        numbers = torch.empty(self.shape)
        for start, codes in self.blocks():
            numbers[start : start + len(codes[0])] = self.decode(codes)
        return numbers

    def refuse_nonfinite(self, origin: str) -> Encoded:
        """The same codes; reading those that mean NaN or infinity raises `CheckpointError`.

        Args:
            origin: Where they come from.
        """

        def read_rows(start: int, stop: int) -> Codes:
            codes = self.read_rows(start, stop)
            if not self._is_finite(codes):
                numbers = (self.decode(block) for _, block in self.blocks())
                raise nonfinite(f"{origin}, {self.name},", nonfinite_rows(numbers))
            return codes

        return dataclasses.replace(self, read_rows=read_rows)

    def _is_finite(self, codes: Codes) -> bool:
        integers, scales, zeros = codes
        offsets = [zeros] if self.has_offsets and zeros is not None else []
        if not all(is_finite(part) for part in (scales, integers, *offsets)):
            return False
        # No code means more than 448, nor is a difference of two bytes larger.
        limit = torch.finfo(torch.float32).max / 2**10
        in_range = not scales.numel() or all(float(part.abs().max()) < limit for part in (scales, *offsets))
        return in_range or is_finite(self.decode(codes))


def codes_of(rounded: Rounded, spec: QuantSpec) -> Codes:
    """Rounded rows as `Codes`."""
    codes = rounded.codes.flatten(1)
    if spec.is_integer and spec.symmetric:
        codes = (codes - 2 ** (spec.bits - 1)).view(torch.int8)
    return codes, rounded.scales, rounded.zero_points


def reordered(order: Sequence[int], start: int, stop: int) -> tuple[int, int, torch.Tensor]:
    """Rows to read for the reordered rows [start, stop), and where each of these stands among them."""
    rows = torch.arange(start, stop)
    stored = rows // len(order) * len(order) + torch.tensor(order)[rows % len(order)]
    low, high = (int(stored.min()), int(stored.max()) + 1) if stop > start else (start, start)
    return low, high, stored - low


def nonfinite(origin: str, rows: str) -> CheckpointError:
    """An error about numbers of a checkpoint."""
    return CheckpointError(
        f"{origin} holds numbers that are not finite in {rows}: fetch the checkpoint again or mend it"
    )
