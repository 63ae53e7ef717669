"""What a tensor's numbers were: exact extremes, and counts by magnitude that merge over batches. Needs no torch.

A float32 number's sign, exponent and first four bits after the leading one, which are its top 13 bits, name its bucket:
16 buckets an octave, over all that float32 holds, alike on every machine. Numbers of one bucket differ by a sixteenth
at most. `graphs.observe` makes the statistic inside of a graph.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from transom.formats.number_format import NumberFormat

KEPT_BITS = 13
"""Leading bits of a float32 that name a bucket: sign, eight of exponent, four of mantissa."""
BUCKETS = 2**KEPT_BITS
EXTREMES = 3
"""Minimum, maximum and the number of zeros stand before the counts."""
SIZE = EXTREMES + BUCKETS

_HALF = BUCKETS // 2
_FINITE = _HALF - 16
"""Buckets of finite magnitudes; the last octave holds what is no number, and infinities."""
_EDGES: NDArray[np.float64] = (
    (np.arange(_FINITE, dtype=np.uint32) << (32 - KEPT_BITS)).view(np.float32).astype(np.float64)
)
_STOPS: NDArray[np.float64] = np.append(_EDGES[1:], 2.0**128)

_POINTS = 16
"""Points by which the numbers of one bucket are represented when errors are estimated."""
_COARSE, _FINE = 16, 9
"""Clipping limits tried an octave, and around the best of them."""
_OCTAVES = 12
"""How far below the largest magnitude a clipping limit is looked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """Statistics of finite numbers, of one tensor or of many.

    Attributes:
        minimum: Least finite number; infinity if there is none.
        maximum: Greatest finite number; minus infinity if there is none.
        zeros: How many were zero.
        counts: How many fell into each bucket, float64 [BUCKETS], zeros left out.
    """

    minimum: float
    maximum: float
    zeros: float
    counts: NDArray[np.float64]

    @staticmethod
    def of(statistic: NDArray[np.float64]) -> Observation:
        """Read what `transom.observe` returned, float64 [SIZE]."""
        minimum, maximum, zeros = (float(value) for value in statistic[:EXTREMES])
        return Observation(
            minimum=minimum, maximum=maximum, zeros=zeros, counts=np.asarray(statistic[EXTREMES:], np.float64)
        )

    @staticmethod
    def none() -> Observation:
        """Of no number at all; merging it changes nothing."""
        return Observation(minimum=math.inf, maximum=-math.inf, zeros=0, counts=np.zeros(BUCKETS))

    def merge(self, other: Observation) -> Observation:
        """Of the numbers of both, as if they had been seen at once."""
        return Observation(
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            zeros=self.zeros + other.zeros,
            counts=self.counts + other.counts,
        )

    @property
    def count(self) -> float:
        """Finite numbers seen."""
        return self.zeros + float(self._magnitudes.sum())

    @property
    def nonfinite(self) -> float:
        """Infinities, and what was no number."""
        return float(self.counts.sum() - self._magnitudes.sum())

    @property
    def largest(self) -> float:
        """Largest finite magnitude, exactly; 0 if there is none."""
        return max(-self.minimum, self.maximum, 0.0)

    @property
    def _magnitudes(self) -> NDArray[np.float64]:
        return self.counts[:_FINITE] + self.counts[_HALF : _HALF + _FINITE]

    def percentile(self, percent: float) -> float:
        """Magnitude that this share of the finite numbers does not exceed, within the width of a bucket.

        Args:
            percent: From 0 to 100; 100 gives the largest magnitude exactly.

        Raises:
            ValueError: If `percent` lies elsewhere, or nothing was seen.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentile lies between 0 and 100, got {percent}")
        if not self.count:
            raise ValueError("no number was seen, so there is no percentile")
        wanted = self.count * percent / 100
        if percent == 100:
            return self.largest
        if wanted <= self.zeros:
            return 0.0
        totals = self.zeros + np.cumsum(self._magnitudes)
        bucket = int(np.searchsorted(totals, wanted))
        share = (wanted - totals[bucket]) / self._magnitudes[bucket] + 1
        stop = min(_STOPS[bucket], self.largest)
        return float(_EDGES[bucket] + share * (stop - _EDGES[bucket]))

    def share_below(self, magnitude: float) -> float:
        """Share of finite numbers other than zero that are smaller than this, within a bucket; 0 if there are none."""
        return float((self._magnitudes * _covered(magnitude)).sum() / max(self._magnitudes.sum(), 1))

    def share_above(self, magnitude: float) -> float:
        """Share of finite numbers that are larger than this, within a bucket; 0 only if there are none."""
        if self.largest <= magnitude:
            return 0.0
        # One that is larger there is, whatever the buckets say.
        return max(float((self._magnitudes * (1 - _covered(magnitude))).sum()), 1.0) / self.count

    def clip_scale(self, number_format: NumberFormat) -> float:
        """The scale that rounds these numbers with the least squared error.

        A number x becomes `scale * round(x / scale)`, where what lies beyond the format's largest number is clipped.
        Within a bucket numbers are taken as evenly spread, so the scale is the best one for their counts.

        Args:
            number_format: What `x / scale` is rounded to.

        Returns:
            The scale; 1 if there is nothing but zeros.
        """
        if not self.largest:
            return 1.0
        points, weights = self._points()

        def best(limits: NDArray[np.float64]) -> float:
            errors = [float(weights @ _squared_errors(points, limit / number_format.largest, number_format))
                      for limit in limits]  # fmt: skip
            # The largest of equals clips least.
            return float(limits[int(np.argmin(errors))])

        limit = best(self.largest * 2.0 ** -(np.arange(_COARSE * _OCTAVES + 1) / _COARSE))
        nearby = limit * 2.0 ** (np.linspace(1, -1, 2 * _FINE + 1) / _COARSE)
        return best(np.minimum(nearby, self.largest)) / number_format.largest

    def squared_error(self, scale: float, number_format: NumberFormat) -> float:
        """Mean squared error of rounding these numbers with a scale; see `clip_scale`."""
        points, weights = self._points()
        return float(weights @ _squared_errors(points, scale, number_format)) / max(self.count, 1.0)

    def _points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Magnitudes that stand for those seen, and how many each stands for."""
        magnitudes, weights = [], []
        for counts, most, least in (
            (self.counts[:_FINITE], self.maximum, self._least(positive=True)),
            (self.counts[_HALF : _HALF + _FINITE], -self.minimum, self._least(positive=False)),
        ):
            filled = np.flatnonzero(counts)
            starts = np.maximum(_EDGES[filled], least)
            stops = np.minimum(_STOPS[filled], most)
            middles = (np.arange(_POINTS) + 0.5) / _POINTS
            magnitudes.append((starts[:, None] + (stops - starts)[:, None] * middles).ravel())
            weights.append(np.repeat(counts[filled] / _POINTS, _POINTS))
        return np.concatenate(magnitudes), np.concatenate(weights)

    def _least(self, *, positive: bool) -> float:
        """Least magnitude on one side of zero, as far as the extremes tell."""
        bound = self.minimum if positive else -self.maximum
        return max(bound, 0.0)


def _covered(magnitude: float) -> NDArray[np.float64]:
    """Share of each bucket that lies below a magnitude."""
    shares: NDArray[np.float64] = np.clip((magnitude - _EDGES) / (_STOPS - _EDGES), 0, 1)
    return shares


def _squared_errors(x: NDArray[np.float64], scale: float, number_format: NumberFormat) -> NDArray[np.float64]:
    error: NDArray[np.float64] = np.square(number_format.round(x / scale) * scale - x)
    return error
