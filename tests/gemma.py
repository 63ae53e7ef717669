"""Gemma 3's configurations, typed as such."""

from __future__ import annotations

from transom.zoo.architectures import preset
from transom.zoo.config import DecoderConfig
from transom.zoo.gemma3 import Gemma3, Gemma3Config
from transom.zoo.layers import Decoder


def gemma_config(config: DecoderConfig) -> Gemma3Config:
    assert isinstance(config, Gemma3Config)
    return config


def gemma_module(module: Decoder) -> Gemma3:
    assert isinstance(module, Gemma3)
    return module


def gemma(name: str) -> Gemma3Config:
    return gemma_config(preset(name).text)
