"""The numbers that a hypothesis is tested on, and what a hypothesis is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from transom.validation.bisection.context import Context
from transom.validation.bisection.sites import Site


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """The numbers of one run at one site.

    Attributes:
        site: The site.
        inputs: Values of its inputs, float32 [rows, ...] each.
        output: What it gave, float32 [rows, ...].
        calls: (start, count) of every call.
        context: The model.
    """

    site: Site
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor
    calls: tuple[tuple[int, int], ...]
    context: Context

    @property
    def positions(self) -> torch.Tensor:
        """Position of every token, int64 [T]."""
        return torch.cat([torch.arange(start, start + count) for start, count in self.calls])


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


RIGHT = "it does what the model says"


def best_factor(predicted: torch.Tensor, output: torch.Tensor) -> float:
    """The number that brings a prediction closest to the output."""
    x, y = (value.double().flatten().nan_to_num(0.0) for value in (predicted, output))
    return float((x @ y) / (x @ x).clamp_min(1e-300))
