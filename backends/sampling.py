"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.graphs.errors import SamplingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose. The default is greedy; the cuts apply in the order in which they stand here.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Keep this many likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens whose probabilities first add up to this.
        min_p: Drop tokens less likely than this times the likeliest one.
        seed: Makes the choices repeatable; None draws a new seed.

    Raises:
        SamplingError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise SamplingError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise SamplingError(f"min_p must lie in [0, 1], got {self.min_p}")
        if self.seed is not None and self.seed < 0:
            raise SamplingError(f"seed must be 0 or more, got {self.seed}")

    def generator(self) -> np.random.Generator:
        """A fresh source of randomness."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: NDArray[Any], generator: np.random.Generator) -> int:
        """The next token, from logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        kept = np.arange(logits.shape[0])
        if 0 < self.top_k < logits.shape[0]:
            kept = np.argpartition(logits, -self.top_k)[-self.top_k :]
        scaled = logits[kept].astype(np.float64) / self.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            # The token that crosses the threshold stays in.
            count = int(np.searchsorted(np.cumsum(probabilities[order]), self.top_p)) + 1
            kept, probabilities = kept[order[:count]], probabilities[order[:count]]
        if self.min_p > 0:
            likely = probabilities >= self.min_p * probabilities.max()
            kept, probabilities = kept[likely], probabilities[likely]
        return int(generator.choice(kept, p=probabilities / probabilities.sum()))
