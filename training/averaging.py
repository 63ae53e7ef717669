"""Averages of weights: WARM's mean; WARP's moving average, spherical interpolation and step back.

Every one of them is a sum of the tensors that go in, each times a number. The numbers are the same for all tensors of
a model, but for spherical interpolation (arXiv 2406.16768), where they follow from the angle between task vectors
(what training added to the start), tensor by tensor. An angle needs no more than the products of all pairs of task
vectors. So a tensor is read twice, in blocks: for the products, and for the sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch

from transom.errors import MergeError
from transom.graphs.weight import Weight

Method = Literal["mean", "ema", "slerp", "liti", "warp"]
METHODS: dict[str, str] = {
    "mean": "the average of all (WARM)",
    "ema": "one step of a moving average, from the first towards the second",
    "slerp": "spherical interpolation of what training added to --start, tensor by tensor (WARP)",
    "liti": "from --start, the share --eta of the way to the average of all",
    "warp": "from --start, the share --eta of the way to their slerp (WARP)",
}

ETA, MU = 0.3, 0.01
"""WARP's own: how far to go from the start, and how far an anchor moves in a step."""

BLOCK_NUMBERS = 2**16
"""Numbers of a tensor that are read and summed at a time (a single row may exceed it): 512 KiB of float64 stay in a
core's cache, which made sums 3 times faster."""

_STRAIGHT = 1e-4
"""Angles, in radians, so near 0 or pi are none. Near 0 a straight line is the arc to within their square; opposite
directions have no arc, and its formula divides by about zero."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arc:
    """Spherical interpolation of some vectors, as a sum.

    Attributes:
        coefficients: What every vector is multiplied with.
        angles: Between what is merged so far and the next vector, in radians, one fewer than there are vectors; None
            where there is no angle and a straight line was taken.
    """

    coefficients: tuple[float, ...]
    angles: tuple[float | None, ...]


def arc(products: torch.Tensor, shares: Sequence[float]) -> Arc:
    """The interpolation of vectors whose products are known.

    More than two are merged one after the other, as WARP's appendix does: with equal shares, the m-th vector takes part
    with 1/m. The order matters then.

    Args:
        products: Scalar products of all pairs of vectors, float64 [M, M].
        shares: How much every vector takes part; with two, the second's is the paper's lambda.
    """
    merged = torch.zeros(len(shares), dtype=torch.float64)
    merged[0], total = 1.0, shares[0]
    angles: list[float | None] = []
    for index in range(1, len(shares)):
        total += shares[index]
        at = shares[index] / total if total else 0.0
        lengths = math.sqrt(max(0.0, float(merged @ products @ merged)) * float(products[index, index]))
        cosine = float(merged @ products[index]) / lengths if lengths else 1.0
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        straight = not _STRAIGHT < angle < math.pi - _STRAIGHT
        if straight:
            kept, added = 1.0 - at, at
        else:
            kept, added = (math.sin(part * angle) / math.sin(angle) for part in (1.0 - at, at))
        merged *= kept
        merged[index] = added
        angles.append(None if straight else angle)
    return Arc(coefficients=tuple(merged.tolist()), angles=tuple(angles))


def mean(tensors: Sequence[torch.Tensor], shares: Sequence[float] | None = None) -> torch.Tensor:
    """The weighted average of tensors of one shape, in the first one's dtype; equal shares by default."""
    return _sum(tensors, _shares(shares, len(tensors)))


def slerp(task_vectors: Sequence[torch.Tensor], shares: Sequence[float] | None = None) -> torch.Tensor:
    """Spherical interpolation of task vectors of one shape, each taken as one vector; see `arc`.

    Args:
        task_vectors: What training added to the start.
        shares: How much each takes part; equal by default.

    Returns:
        What to add to the start, in the first one's dtype.
    """
    stacked = torch.stack([vector.flatten() for vector in task_vectors]).double()
    products = (stacked @ stacked.T).cpu()
    return _sum(task_vectors, arc(products, _shares(shares, len(task_vectors))).coefficients)


def liti(start: torch.Tensor, end: torch.Tensor, eta: float = ETA) -> torch.Tensor:
    """The share `eta` of the straight way from `start` to `end`, in the dtype of `start`; a moving average too."""
    return _sum((start, end), (1.0 - eta, eta))


def _sum(tensors: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    total = tensors[0].double() * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor.double(), alpha=coefficient)
    return total.to(tensors[0].dtype)


def _shares(shares: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Shares that are whole: equal ones if none are given.

    Raises:
        MergeError: If there are more or fewer than models, one is no share, or they do not sum to 1.
    """
    if shares is None:
        return (1.0 / count,) * count
    if len(shares) != count:
        raise MergeError(f"{len(shares)} shares for {count} models: give one for each")
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise MergeError(f"the shares {', '.join(map(str, shares))}: each lies between 0 and 1")
    if not math.isclose(total := math.fsum(shares), 1.0, abs_tol=1e-6):
        raise MergeError(f"the shares {', '.join(map(str, shares))} sum to {total:g}: give shares that sum to 1")
    return tuple(shares)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """What is done with some models; `Average.of` checks it.

    Attributes:
        method: A key of `METHODS`.
        shares: How much every model takes part; they sum to 1.
        eta: Share of the way from the start, for "liti" and "warp".
        mu: Share of the way to the second model, for "ema".
    """

    method: Method
    shares: tuple[float, ...]
    eta: float | None = None
    mu: float | None = None

    @staticmethod
    def of(
        method: str,
        count: int,
        *,
        shares: Sequence[float] | None = None,
        eta: float | None = None,
        mu: float | None = None,
    ) -> Average:
        """An average for `count` models, with the papers' numbers where none are given.

        Raises:
            MergeError: If there is no such method, it takes another number of models, a number is out of range, or the
                method does not read it.
        """
        if method not in METHODS:
            raise MergeError(f"no method named {method!r}: choose one of {', '.join(METHODS)}")
        if count < 2 and method != "liti":
            raise MergeError(f"{method} of one model is that model: name two or more")
        if method == "ema" and count != 2:
            raise MergeError(f"ema takes two models, an anchor and what it moves to, not {count}: choose mean")
        if method == "ema" and shares is not None:
            raise MergeError("ema reads no shares: give --mu")
        for name, value, readers in (("eta", eta, ("liti", "warp")), ("mu", mu, ("ema",))):
            if value is not None and method not in readers:
                raise MergeError(f"{method} reads no --{name}: leave it out, or choose {' or '.join(readers)}")
            if value is not None and not 0.0 <= value <= 1.0:
                raise MergeError(f"--{name} is {value}: it lies between 0 and 1")
        if method == "ema":
            mu = MU if mu is None else mu
            return Average(method="ema", shares=(1.0 - mu, mu), mu=mu)
        if method in ("liti", "warp"):
            eta = ETA if eta is None else eta
        return Average(method=method, shares=_shares(shares, count), eta=eta)  # type: ignore[arg-type]

    @property
    def has_start(self) -> bool:
        """Whether it begins at the model that training began at."""
        return self.method in ("slerp", "liti", "warp")

    @property
    def has_angles(self) -> bool:
        """Whether it reads every tensor for angles first."""
        return self.method in ("slerp", "warp")


def check_start(average: Average, given: bool) -> None:
    """Raise `MergeError` if an average needs the model that training began at and has none, or the other way around."""
    if average.has_start and not given:
        raise MergeError(f"{average.method} goes from the model that training began at: give --start MODEL")
    if given and not average.has_start:
        raise MergeError(f"{average.method} reads no --start: leave it out, or choose slerp, liti or warp")


class MergedTensor:
    """One tensor of a merge, of which rows are read as they are asked for.

    Attributes:
        arc: Its angles; None before rows of it are read, and for methods without them.
    """

    def __init__(
        self,
        average: Average,
        parts: Sequence[Weight],
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Take the tensor of every model: of the start first, if the average has one.

        Args:
            average: What is done.
            parts: Of one shape.
            on_bytes: Called with the number of bytes read each time.
        """
        self._average, self._parts, self._on_bytes = average, tuple(parts), on_bytes
        self.arc: Arc | None = None

    def weight(self, origin: str) -> Weight:
        """The result, float32."""
        return Weight(shape=self._parts[0].shape, dtype=torch.float32, read_rows=self.read_rows, origin=origin)

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the result, float32; sums are float64."""
        shape = self._parts[0].shape
        rows = torch.empty((stop - start, *shape[1:]) if shape else ())
        for low, high in self._ranges(start, stop):
            total: torch.Tensor | None = None
            for part, coefficient in zip(self._parts, self._coefficients, strict=True):
                numbers = self._read(part, low, high)
                total = numbers.mul_(coefficient) if total is None else total.add_(numbers, alpha=coefficient)
            assert total is not None
            if shape:
                rows[low - start : high - start] = total
            else:
                rows.copy_(total)
        return rows

    @functools.cached_property
    def _coefficients(self) -> tuple[float, ...]:
        """What every part is multiplied with."""
        average, scale = self._average, 1.0 if self._average.eta is None else self._average.eta
        if not average.has_start:
            return average.shares
        ends = average.shares
        if average.has_angles:
            self.arc = arc(self._products(), average.shares)
            ends = self.arc.coefficients
        scaled = [scale * coefficient for coefficient in ends]
        return (1.0 - math.fsum(scaled), *scaled)

    def _products(self) -> torch.Tensor:
        """Scalar products of all pairs of task vectors, float64 [M, M]."""
        begin, *ends = self._parts
        products = torch.zeros(len(ends), len(ends), dtype=torch.float64)
        for low, high in self._ranges(0, begin.shape[0] if begin.shape else 1):
            origin = self._read(begin, low, high).flatten()
            vectors = [self._read(end, low, high).flatten().sub_(origin) for end in ends]
            for row, left in enumerate(vectors):
                for column, right in enumerate(vectors[: row + 1]):
                    products[row, column] += torch.dot(left, right)
        return products.tril() + products.tril(-1).T

    def _read(self, part: Weight, start: int, stop: int) -> torch.Tensor:
        """Rows in float64, which the caller may write to."""
        rows = part.read_rows(start, stop)
        self._on_bytes(rows.nbytes)
        return rows.to(torch.float64, copy=True)

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = max(1, BLOCK_NUMBERS // max(1, math.prod(self._parts[0].shape[1:])))
        return ((low, min(low + step, stop)) for low in range(start, stop, step))


def merge_weights(
    average: Average,
    ends: Sequence[Mapping[str, Weight]],
    start: Mapping[str, Weight] | None = None,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, MergedTensor]:
    """Every tensor of a merge, of which nothing is read yet.

    Args:
        average: What is done.
        ends: Weights of every model, by the same names, of the same shapes; see `Weight.of` for tensors in memory.
        start: Those of the model that training began at, if the average has one.
        on_bytes: Called with the number of bytes read each time.

    Raises:
        MergeError: If the average has a start and there is none, or the other way around.
    """
    check_start(average, start is not None)
    models = [*([] if start is None else [start]), *ends]
    return {name: MergedTensor(average, [model[name] for model in models], on_bytes) for name in models[0]}
