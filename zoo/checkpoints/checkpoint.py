"""What a reader of checkpoints returns, whatever the format."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from transom.graphs.weight import Weight
from transom.wording import listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights, and an account of all else that the checkpoint holds.

    Attributes:
        weights: By the names of the module's state dict.
        copies: What repeats a weight, by its name, and is to be held against it.
        left_out: In plain words, a line for each part that the model has no use for, such as a vision tower, and for
            what the checkpoint leaves open or asks for in vain.
    """

    weights: Mapping[str, Weight]
    copies: Mapping[str, tuple[Weight, ...]] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def refuse_differences(weights: Mapping[str, Weight], copies: Mapping[str, tuple[Weight, ...]]) -> dict[str, Weight]:
    """Weights that are held against their copies wherever they are read; see `Weight.refuse_difference`."""
    checked = dict(weights)
    for name, others in copies.items():
        for other in others:
            checked[name] = checked[name].refuse_difference(other)
    return checked


def left_out_line(part: str, names: Collection[str]) -> str:
    """What is told of a part of a checkpoint that the model has no use for.

    Args:
        part: In words, with an article.
        names: Its tensors or keys.
    """
    return f"{part} is left out ({listed(names)})"
