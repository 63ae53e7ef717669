"""The Pareto front: what nothing else beats in both respects."""

from __future__ import annotations

import math
from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one dominates, by rising first number.

    A point dominates another if it is as low in both numbers and lower in one; so of equal points all stay.

    Args:
        points: Two costs each, the lower the better; a point with a number that is not finite is on no front.
    """
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    kept = [index for index in finite if not any(_dominates(points[other], points[index]) for other in finite)]
    return sorted(kept, key=lambda index: points[index])


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
