"""What becomes of one weight when it is quantised: its codes, computed by rows, and a record of the errors.

A weight that was stacked from others is quantised part by part: its numbers are the same on targets that pack
projections and on those that do not, and a part that was codes already is kept whatever its neighbours are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import torch

from transom.errors import QuantizationError
from transom.formats.quantized import decode, pack
from transom.formats.recover import recover, saved_dtype
from transom.formats.rounding import Method, Rounded, round_rows, split_groups
from transom.formats.schemes import QuantSpec
from transom.graphs.weight import Lattice, Weight

BLOCK_NUMBERS = 2**18
"""Numbers quantised at a time: 1 MiB of float32 stays in a core's cache, which made rounding 3 times faster."""


@dataclasses.dataclass(kw_only=True)
class Conversion:
    """What became of one weight. Errors are known once its codes have been read from first to last.

    Attributes:
        weight: Its name.
        number: What its codes are.
        block: Columns that share a scale; all where the spec says so.
        source: Format of the checkpoint's codes; "" if it had none.
        kept: Whether those codes are kept to the bit.
        recovered: Rows whose numbers were found to stand on the grid already, so that nothing was rounded again.
        max_abs: Largest error of a number.
        error: Root of the mean squared error, as a share of the root of the mean square of the numbers.
    """

    weight: str
    number: str
    block: int
    source: str
    kept: bool
    recovered: int = 0
    max_abs: float = 0.0
    squares: float = 0.0
    total: float = 0.0

    @property
    def error(self) -> float:
        """See the class."""
        return float((self.squares / self.total) ** 0.5) if self.total else 0.0

    def measure(self, numbers: torch.Tensor, decoded: torch.Tensor) -> None:
        """Add the errors of some decoded numbers to the record; both are float32 of one shape."""
        errors = decoded - numbers
        self.max_abs = max(self.max_abs, float(errors.abs().max()))
        self.squares += _sum_of_squares(errors)
        self.total += _sum_of_squares(numbers)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "weight": self.weight,
            "number": self.number,
            "block": self.block,
            "source": self.source,
            "kept": self.kept,
            "recovered": self.recovered,
            "max_abs": self.max_abs,
            "error": self.error,
        }


def _sum_of_squares(numbers: torch.Tensor) -> float:
    total = float(numbers.square().sum())
    # Squares of numbers beyond 1e19 leave float32's range; elsewhere float64 would only take longer.
    return total if math.isfinite(total) else float(numbers.double().square().sum())


def can_hold(spec: QuantSpec, lattice: Lattice, columns: int) -> bool:
    """Whether a spec's grid can hold a lattice's codes and scales as they are."""
    if lattice.block % spec.stored_block(columns):
        return False
    if spec.scale_dtype == "bfloat16" and lattice.scale_dtype != "bfloat16":
        return False
    if not spec.is_integer or lattice.number not in ("int4", "int8"):
        return spec.number == lattice.number
    return lattice.bits <= spec.bits and (lattice.symmetric or (not spec.symmetric and lattice.bits == spec.bits))


def spec_of(name: str, weight: Weight, spec: QuantSpec, *, as_shipped: bool) -> QuantSpec:
    """The spec, or as shipped that of the codes which the weight was made from.

    Raises:
        QuantizationError: If it cannot hold so many columns.
    """
    columns, lattice = weight.shape[1], weight.lattice
    try:
        if as_shipped and lattice is not None:
            block: Any = "row" if lattice.block == columns else lattice.block
            spec = QuantSpec(number=lattice.number, block=block, symmetric=lattice.symmetric)
        spec.stored_block(columns), spec.group(columns)
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from None
    return spec


def joint_spec(specs: list[QuantSpec], columns: int) -> QuantSpec | None:
    """A spec that holds the codes of all of these as they are; None if there is none."""
    first = specs[0]
    if all(spec == first for spec in specs):
        return first
    if len({(spec.is_integer or spec.number, spec.symmetric) for spec in specs}) > 1:
        return None
    number = "int8" if first.is_integer and any(spec.bits == 8 for spec in specs) else first.number
    block = math.gcd(*(spec.stored_block(columns) for spec in specs))
    return QuantSpec(number=number, block=block, symmetric=first.symmetric)


class QuantizedRows:
    """Codes, scales and zero points of one weight.

    The three are written one after the other. Scales and zero points are small, so those computed along with the
    codes are kept, for the weight that was read last; otherwise rounding would be done three times.

    Args:
        name: Of the weight.
        weight: The weight, [R, K].
        spec: What the scheme makes of it.
        method: How scales are found.
        as_shipped: Whether codes that it was made from have their own spec.

    Attributes:
        spec: How the codes are held.
        conversions: A record a part.

    Raises:
        QuantizationError: If the spec cannot hold so many columns.
    """

    _last: ClassVar[QuantizedRows | None] = None

    def __init__(
        self, name: str, weight: Weight, spec: QuantSpec, method: Method = "nearest", *, as_shipped: bool = False
    ) -> None:
        parts = weight.parts or (weight,)
        specs = [spec_of(name, part, spec, as_shipped=as_shipped) for part in parts]
        joint = joint_spec(specs, weight.shape[1])
        if joint is None:
            specs, joint = [spec] * len(parts), spec
        self.spec = joint
        self._starts = list(itertools.accumulate((part.shape[0] for part in parts), initial=0))
        self._parts = [
            _Part(name, part, own, joint, start, method, is_whole=len(parts) == 1)
            for part, own, start in zip(parts, specs, self._starts, strict=False)
        ]
        self.conversions = [part.record for part in self._parts]

    def read(self, start: int, stop: int, index: int) -> torch.Tensor:
        """Packed codes (index 0), scales (1) or packed zero points (2) of some rows."""
        if QuantizedRows._last is not self:
            if QuantizedRows._last is not None:
                QuantizedRows._last._forget()
            QuantizedRows._last = self
        pieces = [
            part.read(max(start - low, 0), min(stop, high) - low, index)
            for part, (low, high) in zip(self._parts, itertools.pairwise(self._starts), strict=True)
            if start < high and stop > low
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _forget(self) -> None:
        for part in self._parts:
            part.forget()


class _Part:
    """A weight that was not stacked, as codes of the joint spec of all parts."""

    def __init__(
        self,
        name: str,
        weight: Weight,
        spec: QuantSpec,
        joint: QuantSpec,
        start: int,
        method: Method,
        *,
        is_whole: bool,
    ) -> None:
        self.method = method
        weight = weight.exact or weight
        # Numbers of a checkpoint may stand on a grid although it holds no codes; the first rows tell.
        self._saved: tuple[torch.dtype, int] | None = None
        self._may_recover = weight.lattice is None and spec.is_integer and spec.symmetric
        columns, lattice = weight.shape[1], weight.lattice
        self.name, self.weight, self.spec, self.joint, self.start = name, weight, spec, joint, start
        self.record = Conversion(
            weight=name if is_whole else f"{name}[{start}:{start + weight.shape[0]}]",
            number=spec.number,
            block=spec.group(columns),
            source=lattice.name if lattice else "",
            kept=lattice is not None and can_hold(spec, lattice, columns),
        )
        self._rows = max(1, BLOCK_NUMBERS // weight.shape[1])
        self._measured: set[int] = set()
        self._kept_chunks: set[int] = set()
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tensor_max: float | None = None

    def read(self, start: int, stop: int, index: int) -> torch.Tensor:
        """See `QuantizedRows.read`."""
        rows: torch.Tensor | None = None
        for low in range(start - start % self._rows, stop, self._rows):
            piece = self._chunk(low, index)
            first, last = max(start, low), min(stop, low + piece.shape[0])
            if rows is None:
                rows = piece.new_empty((stop - start, *piece.shape[1:]))
            rows[first - start : last - start] = piece[first - low : last - low]
        assert rows is not None, "no rows were asked for"
        return rows

    def _chunk(self, low: int, index: int) -> torch.Tensor:
        high = min(low + self._rows, self.weight.shape[0])
        if index and self._kept is not None and low in self._kept_chunks:
            return self._kept[index - 1][low:high]
        parts = self._quantize(low, high)
        if self._kept is None:
            # One tensor for all rows: many small ones, kept between larger temporary ones, fragment the heap.
            scales, zeros = (small.new_empty((self.weight.shape[0], small.shape[1])) for small in parts[1:])
            self._kept = scales, zeros
        for kept, small in zip(self._kept, parts[1:], strict=True):
            kept[low:high] = small
        self._kept_chunks.add(low)
        return parts[index]

    def forget(self) -> None:
        """Free what was kept."""
        self._kept_chunks, self._kept = set(), None

    def _quantize(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rounded, number = self._keep(start, stop) if self.record.kept else self._round(start, stop), self.joint.number
        if number != self.spec.number and self.spec.symmetric:
            # The middle code of 8 bits in place of that of 4.
            rounded = dataclasses.replace(rounded, codes=rounded.codes + 2**7 - 2**3)
        rounded = split_groups(rounded, self.joint, self.weight.shape[1])
        zeros = rounded.zero_points
        if zeros is None:
            zeros = torch.empty(stop - start, 0, dtype=torch.uint8)
        return pack(rounded.codes, number), rounded.scales, pack(zeros, number)

    def _keep(self, start: int, stop: int) -> Rounded:
        """The checkpoint's own codes."""
        spec, columns = self.spec, self.weight.shape[1]
        assert self.weight.lattice is not None
        block = spec.stored_block(columns)
        codes, scales, zeros = self.weight.lattice.with_block(block).read_rows(start, stop)
        self._check_finite(scales, start, stop)
        middle = 2 ** (spec.bits - 1)
        if spec.is_integer and self.weight.lattice.symmetric:
            codes = (codes.to(torch.int16) + middle).to(torch.uint8)
            zeros = None if spec.symmetric else torch.full(scales.shape, middle, dtype=torch.uint8)
        return Rounded(codes=codes.view(stop - start, -1, block), scales=scales, zero_points=zeros)

    def _round(self, start: int, stop: int) -> Rounded:
        rows = self.weight.read_rows(start, stop).float()
        self._check_finite(rows, start, stop)
        if self.spec.block == "tensor" and self._tensor_max is None:
            self._tensor_max = self._largest()
        recovered = self._recover(rows)
        try:
            rounded = recovered or round_rows(rows, self.spec, self.method, tensor_max=self._tensor_max)
        except QuantizationError as error:
            raise QuantizationError(f"{self.name}, {self._rows_of(start, stop)}: {error}") from None
        if start not in self._measured:
            self._measured.add(start)
            self.record.recovered += 0 if recovered is None else len(rows)
            again = decode(rounded.codes, rounded.scales, rounded.zero_points, self.spec.number)
            self.record.measure(rows, again.view_as(rows))
        return rounded

    def _recover(self, rows: torch.Tensor) -> Rounded | None:
        if not self._may_recover:
            return None
        if self._saved is None:
            self._saved = saved_dtype(rows)
        columns = rows.shape[1]
        rounded = recover(rows.view(len(rows), -1, self.spec.group(columns)), self.spec, self._saved)
        if rounded is not None and self.spec.scale_dtype == "bfloat16":
            # Runtimes that take such scales take none below zero.
            narrow_scales = rounded.scales.to(torch.bfloat16).float()
            if not (torch.equal(narrow_scales, rounded.scales) and bool((narrow_scales > 0).all())):
                rounded = None
        self._may_recover = rounded is not None
        return None if rounded is None else split_groups(rounded, self.spec, columns)

    def _largest(self) -> float:
        largest, start = 0.0, 0
        for rows in self.weight.blocks():
            self._check_finite(rows, start, start + len(rows))
            largest, start = max(largest, float(rows.abs().max())), start + len(rows)
        return largest

    def _check_finite(self, values: torch.Tensor, start: int, stop: int) -> None:
        if not bool(torch.isfinite(values).all()):
            where = self._rows_of(start, stop)
            raise QuantizationError(f"{self.name} holds NaN or infinity in {where}: mend the checkpoint")

    def _rows_of(self, start: int, stop: int) -> str:
        return f"rows {self.start + start} to {self.start + stop}"
