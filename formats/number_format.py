"""Number formats that values may be rounded to: what they hold, and how they round. Needs no torch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from transom.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A format, symmetric around zero.

    Attributes:
        name: As torch and numpy call it.
        largest: Largest number.
        exponent: Of the smallest normal number, a power of two; integers have one step of 2 ** 0 all over.
        digits: Bits after the leading one; 0 for integers.
    """

    name: str
    largest: float
    exponent: int = 0
    digits: int | None = None

    @property
    def smallest(self) -> float:
        """Smallest number above zero."""
        return math.ldexp(1.0, self.exponent - (self.digits or 0))

    def round(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The nearest number of the format, ties to even; what lies beyond the largest becomes the largest."""
        steps: float | NDArray[np.float64] = 1.0
        if self.digits is not None:
            # frexp's mantissa lies in [0.5, 1), so its exponent is one more.
            exponents = np.maximum(np.frexp(x)[1] - 1, self.exponent)
            steps = np.ldexp(1.0, exponents - self.digits)
        rounded: NDArray[np.float64] = np.clip(np.rint(x / steps) * steps, -self.largest, self.largest)
        return rounded


FORMATS: dict[str, NumberFormat] = {
    number_format.name: number_format
    for number_format in (
        NumberFormat(name="float16", largest=65504.0, exponent=-14, digits=10),
        NumberFormat(name="bfloat16", largest=float.fromhex("0x1.fep127"), exponent=-126, digits=7),
        NumberFormat(name="float8_e4m3fn", largest=448.0, exponent=-6, digits=3),
        NumberFormat(name="int8", largest=127.0),
        NumberFormat(name="int4", largest=7.0),
    )
}
"""By name. Integers are symmetric: -128 and -8 are left out."""

FLOATS = tuple(name for name, number_format in FORMATS.items() if number_format.digits is not None)
"""Those that values can be held in without a scale."""


def float_format(name: str) -> NumberFormat:
    """Look a floating-point format up.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in FLOATS:
        raise ConfigError(f"no floating-point format named {name!r}: choose one of {', '.join(FLOATS)}")
    return FORMATS[name]
