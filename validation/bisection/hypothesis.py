"""What a hypothesis is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

RIGHT = "it does what the model says"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """A possible cause, and what the site would give if it were true.

    Attributes:
        op: The word for the verdict.
        cause: In words.
        predict: Makes the output, float32 [rows, ...].
    """

    op: str
    cause: str
    predict: Callable[[], torch.Tensor]


def best_factor(predicted: torch.Tensor, output: torch.Tensor) -> float:
    """The number that brings a prediction closest to the output."""
    x, y = (value.double().flatten().nan_to_num(0.0) for value in (predicted, output))
    return float((x @ y) / (x @ x).clamp_min(1e-300))
