"""One axis of a scatter plot: where a value stands, and which round numbers are written beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

SPREAD = 4.0
"""From this ratio of largest to smallest on, an axis is logarithmic: or one bad value would hide the others."""

ROOM = 0.08
"""Share of the axis that is left free on each side of the values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale.

    Attributes:
        low: Value at its beginning, above 0 if it is logarithmic.
        high: Value at its end.
        logarithmic: Whether equal steps are equal ratios.
    """

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(values: Sequence[float]) -> Axis:
        """An axis that holds all finite values with some room around them."""
        finite = [value for value in values if math.isfinite(value)] or [1.0]
        low, high = min(finite), max(finite)
        if low > 0 and high / low >= SPREAD:
            room = (high / low) ** ROOM
            return Axis(low=low / room, high=high * room, logarithmic=True)
        room = ROOM * ((high - low) or abs(high) or 1.0)
        return Axis(low=low - room, high=high + room, logarithmic=False)

    def share(self, value: float) -> float:
        """Where a value stands: 0 at the beginning, 1 at the end."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Some round numbers, as written."""
        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 3, 5, 7)]
            return [(value, f"{value:,g}") for value in values if self.low <= value <= self.high]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        digits = max(0, -math.floor(math.log10(step)))
        first = math.ceil(self.low / step)
        values = [count * step for count in range(first, math.floor(self.high / step) + 1)]
        return [(value, f"{value:,.{digits}f}") for value in values]
