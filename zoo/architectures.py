"""The one list of model files, and what tensors each of them needs."""

from __future__ import annotations

import torch

from transom.errors import ConfigError
from transom.zoo.config import DecoderConfig
from transom.zoo.gemma3 import Gemma3

ARCHITECTURES: dict[str, type[Gemma3]] = {"gemma3": Gemma3}


def build_empty(config: DecoderConfig) -> Gemma3:
    """Build the module on the meta device: names and shapes, no memory.

    Raises:
        ConfigError: If no model file is known for `config.architecture`.
    """
    if config.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{config.name}: unknown architecture {config.architecture!r}: known are {', '.join(ARCHITECTURES)}"
        )
    with torch.device("meta"):
        return ARCHITECTURES[config.architecture](config)


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model must hold, in the module's order.

    Raises:
        ConfigError: If no model file is known for `config.architecture`.
    """
    return {name: tuple(tensor.shape) for name, tensor in build_empty(config).state_dict().items()}
