"""The one list of model files, and what can be known of a model without its weights."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import torch

from transom.errors import ConfigError
from transom.zoo.architecture import Architecture, Preset
from transom.zoo.config import DecoderConfig
from transom.zoo.layers import Decoder

ARCHITECTURES = (
    "gemma3",
    "gemma3_vision",
    "gemma2",
    "gemma4",
    "llama3",
    "qwen2",
    "qwen3",
    "mistral",
    "ministral3",
    "olmo3",
    "exaone4",
    "cohere2",
    "smollm3",
    "mamba2",
    "rwkv7",
    "gpt_oss",
    "adaptive",
    "longnet",
)
"""Files of this folder; each holds an `ARCHITECTURE`."""


@functools.cache
def architecture(name: str) -> Architecture:
    """Look a family up.

    Raises:
        ConfigError: If no model file has that name.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"unknown architecture {name!r}: known are {', '.join(ARCHITECTURES)}")
    record: Architecture = importlib.import_module(f"transom.zoo.{name}").ARCHITECTURE
    return record


def architectures() -> tuple[Architecture, ...]:
    """Every family, in the order of the list."""
    return tuple(architecture(name) for name in ARCHITECTURES)


@functools.cache
def presets() -> dict[str, Preset]:
    """Every family's presets by name."""
    return {preset.config.name: preset for family in architectures() for preset in family.presets}


def preset(name: str) -> DecoderConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: If there is no preset of that name.
    """
    if name not in presets():
        raise ConfigError(
            f"no model named {name!r}: choose one of {', '.join(presets())}, a checkpoint folder or a .gguf file"
        )
    return presets()[name].config


def packaged(name: str) -> Path:
    """The GGUF file of a preset whose weights a package brings.

    Raises:
        ConfigError: If there is no preset of that name, or no package brings its weights.
        CheckpointError: If the package is not installed, or the file cannot be written.
    """
    preset(name)
    if (locate := presets()[name].packaged) is None:
        raise ConfigError(f"no package brings the weights of {name}: give a checkpoint folder or a .gguf file")
    return locate()


def build_empty(config: DecoderConfig) -> Decoder:
    """Build the module on the meta device: names and shapes, no memory.

    Raises:
        ConfigError: If no model file is known for `config.architecture`.
    """
    try:
        build = architecture(config.architecture).build
    except ConfigError as error:
        raise ConfigError(f"{config.name}: {error}") from None
    with torch.device("meta"):
        return build(config)


def with_windows(config: DecoderConfig, windows: tuple[int | None, ...]) -> DecoderConfig:
    """A configuration of the same tensors whose layers have these windows, None for a global one.

    Raises:
        ConfigError: If the family's layers cannot have windows of their own.
    """
    change = architecture(config.architecture).with_windows
    if change is None:
        able = [family.name for family in architectures() if family.with_windows is not None]
        raise ConfigError(
            f"{config.name}: layers of {config.architecture} cannot each have a window of their own: choose a model of "
            f"{' or '.join(able)}"
        )
    return change(config, windows)


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model must hold, in the module's order.

    Raises:
        ConfigError: If no model file is known for `config.architecture`.
    """
    return {name: tuple(tensor.shape) for name, tensor in build_empty(config).state_dict().items()}
