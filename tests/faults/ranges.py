"""gemma3-tiny with weights that drive its numbers out of float16's range, as trained models' do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from transom.graphs.weight import Weight
from transom.zoo.model import Model


def _first_channels(weight: torch.Tensor) -> torch.Tensor:
    """A few channels of a norm's output are huge."""
    return torch.cat((weight[:2] + 50_000, weight[2:]))


PLANTED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # The stream is out of range from layer 1 on.
    "layers.1.post_feedforward_layernorm.weight": _first_channels,
    # The product of gate and up, and what comes of it, up to the norm behind it.
    "layers.2.mlp.gate_proj.weight": lambda weight: weight * 2000,
    "layers.2.mlp.up_proj.weight": lambda weight: weight * 2000,
    # A projection whose input is in range.
    "layers.4.mlp.down_proj.weight": lambda weight: weight * 1e5,
}


def plant(model: Model) -> Model:
    """The model with those weights."""
    changed = {name: Weight.of(edit(model.weights[name].read().float())) for name, edit in PLANTED.items()}
    return dataclasses.replace(model, weights={**model.weights, **changed}, revision="planted")
