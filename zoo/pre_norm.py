"""What families share whose blocks norm what goes into attention and into a gated MLP: Llama, Qwen, Mistral.

A family's file says what is its own: how attention differs, which layers have a window, what its files look like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from transom.zoo.checkpoints.gguf_config import USUAL_TENSORS, Sizes, read_gguf_rope
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import LARGEST, LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.layers import Attention, PreNormLayer, RMSNorm, Rotation, StackedDecoder
from transom.zoo.rope import Rope, rotate, rotation
from transom.zoo.rope_keys import read_rope, rope_parameters
from transom.zoo.usual_keys import read_usual_sizes, usual_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreNormConfig(LocalGlobalConfig):
    """A decoder whose layers are alike but for their windows.

    Attributes:
        rope: Rotary embedding.
        tied: Whether the head is the table of tokens.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps")
    SCALED = ("rope",)

    window: int | None = None
    rope: Rope
    tied: bool


class RotatedAttention(Attention):
    """Attention whose queries and keys are rotated."""

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cos_sin is not None
        return rotate(self.split(q_BTX), *cos_sin), rotate(self.split(k_BTX), *cos_sin)


class PreNormDecoder(StackedDecoder):
    """The decoder."""

    config: PreNormConfig
    attention: Callable[[Any, int], Attention] = RotatedAttention
    """Builds the attention of the layer with an index."""

    def __init__(self, config: PreNormConfig) -> None:
        def layer(config: PreNormConfig, index: int) -> PreNormLayer:
            return PreNormLayer(config, type(self).attention(config, index))

        super().__init__(config, layer, RMSNorm(config.hidden_size, config.norm_eps), tied=config.tied)

    def rotations(self, positions_T: torch.Tensor) -> Sequence[Rotation]:
        return [rotation(positions_T, self.config.rope, self.config.head_dim)] * self.config.num_layers


KEYS = frozenset(
    {
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
        "layer_types", "tie_word_embeddings",
    }
)  # fmt: skip
"""Keys that `read` and the readers of layers read, beside sizes."""

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "text_config": (None,),
}


def read(text: Keys, sizes: Mapping[str, int], *, eps: float = 1e-6, rope_keys: Sequence[str] = ()) -> dict[str, Any]:
    """Fields of a configuration, less the layers' kinds and their window.

    Args:
        text: Keys that describe the decoder.
        sizes: Class defaults.
        eps: Epsilon of norms, where the config does not say.
        rope_keys: Keys among the rotary embedding's that the family reads itself.

    Raises:
        ConfigError: If a value is one that no such model has.
    """
    return {
        **read_usual_sizes(text, sizes),
        "rope": read_rope(text, 1e4, beside=rope_keys),
        "norm_eps": text.number("rms_norm_eps", eps),
        "tied": text.flag("tie_word_embeddings", False),
    }


def read_depth(text: Keys, sizes: Mapping[str, int]) -> int:
    """Number of layers; raises `ConfigError` if it is none."""
    return text.whole("num_hidden_layers", sizes["num_hidden_layers"], LARGEST["num_layers"])


def read_uniform(text: Keys, depth: int, window: int | None) -> dict[str, Any]:
    """Kinds of layers that are all alike, and their window.

    Args:
        text: Keys that describe the decoder.
        depth: Number of layers.
        window: Of every layer; None for none.

    Raises:
        ConfigError: If `layer_types` says otherwise, which transformers passes over.
    """
    name = "full_attention" if window is None else "sliding_attention"
    if text.get("layer_types") not in (None, [name] * depth):
        text.refuse("layer_types", f"expected {name} for each of {depth} layers, as other kinds are not supported")
    return {"layer_kinds": tile("G" if window is None else "L", depth), "window": window}


def write(config: PreNormConfig, model_type: str, class_name: str) -> dict[str, Any]:
    """A `config.json`, less what it says of windows."""
    return {
        "architectures": [class_name],
        "model_type": model_type,
        **usual_sizes(config),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(config.rope),
        "tie_word_embeddings": config.tied,
    }


GGUF_TENSORS = {**USUAL_TENSORS, "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """Fields of a configuration beside its sizes. No layer has a window in llama.cpp."""
    keys.agree("attention.scale", sizes.head_dim**-0.5)
    return {
        "layer_kinds": tile("G", sizes.num_layers),
        "rope": read_gguf_rope(sizes, keys, lines),
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tied": "output.weight" not in sizes.header.tensors,
    }


def as_stored(config: PreNormConfig, name: str) -> None:
    """Rows stand in a GGUF file as in the module."""
