"""Differences between two models' logits, position by position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

ROWS = 64
"""Positions compared at a time: 64 MiB of logits of Gemma's vocabulary."""

Logits = Callable[[int, int], torch.Tensor]
"""Logits [R, V] of the positions first to last + 1."""

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """One number a position, [T] each; NaN where logits are not finite.

    Attributes:
        first: The first position.
        max_abs: Largest difference of any logit.
        magnitude: Largest logit of the oracle, by absolute value.
        kl: KL(oracle || target), in nats.
        gap: How much likelier, in logits of the oracle, its best token is than the target's; 0 where they agree.
    """

    first: int
    max_abs: Array
    magnitude: Array
    kl: Array
    gap: Array

    @property
    def relative(self) -> Array:
        """`max_abs` as a share of `magnitude`."""
        return np.asarray(self.max_abs / np.maximum(self.magnitude, np.finfo(np.float32).tiny))

    @staticmethod
    def join(parts: Sequence[Differences]) -> Differences:
        """Parts of one run, in order."""
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("max_abs", "magnitude", "kl", "gap")
        }
        return Differences(first=parts[0].first, **arrays)


def compare(logits: NDArray[np.float32], expected: Logits, first: int) -> Differences:
    """Compare a target's logits with the oracle's, a few positions at a time.

    Args:
        logits: Logits [T, V] of a target.
        expected: The oracle.
        first: Position of the first row.
    """
    parts = []
    for low in range(0, len(logits), ROWS):
        rows = torch.from_numpy(np.ascontiguousarray(logits[low : low + ROWS]))
        parts.append(_compare_rows(rows, expected(first + low, first + low + len(rows)), first + low))
    return Differences.join(parts)


def divergence(logits: NDArray[np.float32], expected: Logits, first: int) -> Array:
    """KL(expected || logits) of every position alone, [T]."""
    parts = []
    for low in range(0, len(logits), ROWS):
        rows = torch.from_numpy(np.ascontiguousarray(logits[low : low + ROWS]))
        beside = expected(first + low, first + low + len(rows))
        parts.append(kl(beside.log_softmax(-1), rows.log_softmax(-1)))
    return np.concatenate(parts)


def _compare_rows(rows: torch.Tensor, expected: torch.Tensor, first: int) -> Differences:
    best, chosen = expected.argmax(-1, keepdim=True), rows.argmax(-1, keepdim=True)
    gap = (expected.gather(1, best) - expected.gather(1, chosen))[:, 0]
    # Also of a NaN, which torch calls the largest of all, the gap must not be a number.
    gap = torch.where(rows.gather(1, chosen)[:, 0].isnan(), torch.nan, gap)
    return Differences(
        first=first,
        max_abs=_array((rows - expected).abs().amax(-1)),
        magnitude=_array(expected.abs().amax(-1)),
        kl=kl(expected.log_softmax(-1), rows.log_softmax(-1)),
        gap=_array(gap),
    )


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Array:
    """KL(p || q) in nats of log probabilities [R, V], row by row."""
    terms = log_p.exp() * (log_p - log_q)
    # Rounding can leave a sum of almost nothing below zero.
    return _array(terms.sum(-1, dtype=torch.float64).clamp(min=0))


def _array(values: torch.Tensor) -> Array:
    return values.double().numpy()
