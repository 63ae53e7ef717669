"""`Mask`: which keys a query sees, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees of those that are not after it: the ones that meet every condition.

    Its fields are arguments of `attention` and `attend`, under the same names.

    Attributes:
        window: How many positions back it sees, its own included; 0 for any number.
        segment: Length of the segments that positions are cut into; it sees none before its own. 0 for no segments.
        dilation: Of every so many positions it sees one, its own among them.
    """

    window: int = 0
    segment: int = 0
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Newest positions among which are all that a query sees, whichever it is; 0 if there is no bound."""
        bounds = [size for size in (self.window, self.segment) if size]
        return (min(bounds) - 1) // self.dilation * self.dilation + 1 if bounds else 0

    @property
    def is_window(self) -> bool:
        """Whether it is every earlier key, or as many of them as a window holds."""
        return self == Mask(window=self.window)

    def conditions(self, positions: Any, keys: Any) -> Iterator[Any]:
        """What a key must meet beside `0 <= key` and not being after the query; none for every earlier key.

        Args:
            positions: Of queries: a tensor of any library, or numbers.
            keys: Of keys, which broadcast with them.
        """
        if self.window:
            yield positions - keys < self.window
        if self.segment:
            yield keys >= positions - positions % self.segment
        if self.dilation > 1:
            yield keys % self.dilation == positions % self.dilation
