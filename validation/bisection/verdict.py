"""The answer of a bisection."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Where two runs part.

    Attributes:
        entry: Of the model: "decode", or "encode_image".
        layer: Index of the layer; None before the first and after the last, or without a divergence.
        op: "norm", "projection", "rope", "mask", "cache write", "softmax", "quantisation", "embedding", "activation",
            "residual", "average", "experts" or "logits".
        stage: The pass that brought it in, "lowering" if the graph that the passes leave is right, None if that was not
            examined or is not known.
        max_abs: Largest difference at that site; without a divergence, that of the logits. None if a value is NaN or
            infinite.
        relative: The same as a share of the largest value of its position; without a divergence, of any site.
        side: Which run is at fault, "a" or "b"; None if neither does what the model says.
        position: First position that differs.
        positions: How many differ.
        hypotheses: What was tried: (cause, error of the prediction as a share), best first.
        compared: How many taps were compared.
        tolerance: The share up to which values agree.
        others: Verdicts of the model's other entries, if it has some; those that diverged first.
    """

    diverged: bool
    entry: str = "decode"
    layer: int | None = None
    op: str | None = None
    stage: str | None = None
    max_abs: float | None = 0.0
    relative: float | None = 0.0
    cause: str = "no value differs beyond the tolerance"
    tap: str | None = None
    side: Literal["a", "b"] | None = None
    position: int | None = None
    positions: int = 0
    hypotheses: tuple[tuple[str, float], ...] = ()
    compared: int = 0
    tolerance: float = 0.0
    others: tuple[Verdict, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tried = [{"cause": cause, "error": error} for cause, error in self.hypotheses]
        return {**vars(self), "hypotheses": tried, "others": [other.to_json() for other in self.others]}
