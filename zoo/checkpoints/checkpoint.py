"""What a reader of checkpoints returns, whatever the format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from transom.graphs.weight import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights, and an account of all else that the checkpoint holds.

    Attributes:
        weights: By the names of the module's state dict.
        left_out: In plain words, a line for each part that the model has no use for, such as a vision tower, and for
            what the checkpoint leaves open or asks for in vain.
    """

    weights: Mapping[str, Weight]
    left_out: tuple[str, ...] = ()
