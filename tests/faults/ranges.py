"""Tiny models with weights that drive their numbers out of float16's range, as trained models' do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

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


_TOWER = "vision_tower.encoder.layers"

PLANTED_ENCODER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # The scores before the softmax, which stay inside attention.
    f"{_TOWER}.0.self_attn.q_proj.weight": lambda weight: weight * 50,
    f"{_TOWER}.0.self_attn.k_proj.weight": lambda weight: weight * 50,
    # What is between the two linears, and a stream that is out of range up to the last norm.
    f"{_TOWER}.0.mlp.fc1.weight": lambda weight: weight * 1e5,
    f"{_TOWER}.1.mlp.fc2.bias": _first_channels,
}


def plant(model: Model, planted: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = PLANTED) -> Model:
    """The model with those weights."""
    changed = {name: Weight.of(edit(model.weights[name].read().float())) for name, edit in planted.items()}
    return dataclasses.replace(model, weights={**model.weights, **changed}, revision="planted")
