"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.errors import SamplingError

_WHOLE = (int, np.integer)
_NUMBER = (*_WHOLE, float, np.floating)
_KINDS: dict[str, tuple[type, ...]] = {
    "temperature": _NUMBER,
    "top_k": _WHOLE,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "seed": (*_WHOLE, type(None)),
}


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
        SamplingError: If a value is no number, or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                whole = "" if float in kinds else "whole "
                raise SamplingError(f"{name} must be a {whole}number, got {value!r}")
        if not 0 <= self.temperature <= sys.float_info.max:
            raise SamplingError(f"temperature must be 0 or more, and finite, got {self.temperature}")
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
        """The next token, from logits [V].

        Raises:
            SamplingError: If the largest of them is no finite number.
        """
        largest = logits.max()
        if not np.isfinite(largest):
            raise SamplingError(
                f"the largest of the model's logits is {largest}, so no token can be chosen: transom validate tells "
                "where its numbers leave their range"
            )
        if self.temperature == 0:
            return int(logits.argmax())
        kept = np.arange(logits.shape[0])
        if 0 < self.top_k < logits.shape[0]:
            kept = np.argpartition(logits, -self.top_k)[-self.top_k :]
        # With the largest at 0, a temperature near 0 leaves it alone: what is below overflows to minus infinity.
        with np.errstate(over="ignore"):
            scaled = (logits[kept].astype(np.float64) - np.float64(largest)) / float(self.temperature)
        probabilities = np.exp(scaled)
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
