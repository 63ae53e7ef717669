"""What becomes of one weight when it is quantised: its codes, computed by rows, and a record of the errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from transom.errors import QuantizationError
from transom.formats.finite import is_finite
from transom.formats.quantized import decode
from transom.formats.recover import recover, saved_dtype
from transom.formats.rounding import Method, Rounded, round_rows, split_groups
from transom.formats.schemes import QuantSpec
from transom.graphs.encoded import Codes, Encoded, codes_of, rows_at_once
from transom.graphs.weight import Weight


@dataclasses.dataclass(kw_only=True)
class Conversion:
    """What became of one weight. Errors are known once its codes have been read from first to last.

    Attributes:
        weight: Its name.
        format: What its codes are.
        block: Columns that share a scale; all where the spec says so.
        source: Format of the checkpoint's codes; "" if it had none.
        kept: Whether those codes are kept to the bit.
        recovered: Rows whose numbers were found to stand on the grid already, so that nothing was rounded again.
        max_abs: Largest error of a number.
        error: Root of the mean squared error, as a share of the root of the mean square of the numbers.
    """

    weight: str
    format: str
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
            "number": self.format,
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


def can_hold(spec: QuantSpec, encoded: Encoded) -> bool:
    """Whether a spec's grid can hold codes and scales as they are."""
    encoded = encoded.as_integers() if spec.is_integer else encoded
    if encoded.block % spec.stored_block(encoded.shape[1]) or encoded.has_offsets != spec.has_offsets:
        return False
    if spec.scale_dtype == "bfloat16" and encoded.scale_dtype != "bfloat16":
        return False
    if not spec.is_integer or not encoded.is_integer:
        return spec.format == encoded.format
    return encoded.bits <= spec.bits and (encoded.symmetric or (not spec.symmetric and encoded.bits == spec.bits))


def encode(name: str, weight: Weight, spec: QuantSpec, method: Method = "nearest") -> tuple[Encoded, Conversion]:
    """A weight as codes.

    Args:
        name: Of the weight.
        weight: The weight, [R, K].
        spec: How; see `passes.convert_quantized.scheme_spec`.
        method: How scales are found.

    Returns:
        The codes, computed as they are read, and the record, which reading them completes.
    """
    encoder = _Encoder(name, weight, spec, method)
    return Encoded.of(spec, weight.shape, encoder.read_rows), encoder.record


class _Encoder:
    """Encodes the rows of one weight, and knows what was learned from those read so far."""

    def __init__(self, name: str, weight: Weight, spec: QuantSpec, method: Method) -> None:
        weight = weight.exact or weight
        columns, encoded = weight.shape[1], weight.encoded
        self.name, self.weight, self.spec, self.method = name, weight, spec, method
        self.record = Conversion(
            weight=name,
            format=spec.format,
            block=spec.group(columns),
            source=encoded.name if encoded else "",
            kept=encoded is not None and can_hold(spec, encoded),
        )
        # Numbers of a checkpoint may stand on a grid although it holds no codes; the first rows tell. From the first
        # rows on that do not, all are rounded.
        self._saved: tuple[torch.dtype, int] | None = None
        self._recovered = weight.shape[0] if encoded is None and spec.is_integer and spec.symmetric else 0
        self._rows = rows_at_once(columns)
        self._measured: set[int] = set()
        self._tensor_max: float | None = None

    def read_rows(self, start: int, stop: int) -> Codes:
        """See `Encoded`; whole pieces are encoded, however rows are asked for."""
        rows: tuple[torch.Tensor | None, ...] = ()
        for low in range(start - start % self._rows, stop, self._rows):
            piece = self._encode(low, min(low + self._rows, self.weight.shape[0]))
            first, last = max(start, low), min(stop, low + len(piece[0]))
            # One tensor for all rows: many small ones, kept between larger temporary ones, fragment the heap.
            rows = rows or tuple(
                part if part is None else part.new_empty(stop - start, part.shape[1]) for part in piece
            )
            for whole, part in zip(rows, piece, strict=True):
                if whole is not None and part is not None:
                    whole[first - start : last - start] = part[first - low : last - low]
        codes, scales, zeros = rows
        assert codes is not None and scales is not None
        return codes, scales, zeros

    def _encode(self, start: int, stop: int) -> Codes:
        return self._keep(start, stop) if self.record.kept else codes_of(self._round(start, stop), self.spec)

    def _keep(self, start: int, stop: int) -> Codes:
        """The checkpoint's own codes."""
        spec, encoded = self.spec, self.weight.encoded
        assert encoded is not None
        encoded = encoded.as_integers() if spec.is_integer else encoded
        codes, scales, zeros = encoded.with_block(spec.stored_block(self.weight.shape[1])).read_rows(start, stop)
        self._check_finite(scales, start, stop)
        if encoded.has_offsets and zeros is not None:
            self._check_finite(zeros, start, stop)
        if encoded.symmetric and not spec.symmetric:
            middle = 2 ** (spec.bits - 1)
            codes = codes.view(torch.uint8) + middle
            zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
        return codes, scales, zeros

    def _round(self, start: int, stop: int) -> Rounded:
        rows = self.weight.read_rows(start, stop).float()
        self._check_finite(rows, start, stop)
        if self.spec.block == "tensor" and self._tensor_max is None:
            self._tensor_max = self._largest()
        recovered = self._recover(rows, start) if start < self._recovered else None
        try:
            rounded = recovered or round_rows(rows, self.spec, self.method, tensor_max=self._tensor_max)
        except QuantizationError as error:
            raise QuantizationError(f"{self.name}, {_rows_of(start, stop)}: {error}") from None
        if start not in self._measured:
            self._measured.add(start)
            self.record.recovered += 0 if recovered is None else len(rows)
            again = decode(rounded.codes, rounded.scales, rounded.zero_points, self.spec.format)
            self.record.measure(rows, again.view_as(rows))
        return rounded

    def _recover(self, rows: torch.Tensor, start: int) -> Rounded | None:
        if self._saved is None:
            self._saved = saved_dtype(rows)
        columns = rows.shape[1]
        rounded = recover(rows.view(len(rows), -1, self.spec.group(columns)), self.spec, self._saved)
        if rounded is not None and self.spec.scale_dtype == "bfloat16":
            # Runtimes that take such scales take none below zero.
            narrow_scales = rounded.scales.to(torch.bfloat16).float()
            if not (torch.equal(narrow_scales, rounded.scales) and bool((narrow_scales > 0).all())):
                rounded = None
        if rounded is None:
            self._recovered = start
            return None
        return split_groups(rounded, self.spec, columns)

    def _largest(self) -> float:
        largest, start = 0.0, 0
        for rows in self.weight.blocks():
            self._check_finite(rows, start, start + len(rows))
            largest, start = max(largest, float(rows.abs().max())), start + len(rows)
        return largest

    def _check_finite(self, values: torch.Tensor, start: int, stop: int) -> None:
        if not is_finite(values):
            where = _rows_of(start, stop)
            raise QuantizationError(f"{self.name} holds NaN or infinity in {where}: mend the checkpoint")


def _rows_of(start: int, stop: int) -> str:
    return f"rows {start} to {stop}"
