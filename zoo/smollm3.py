"""SmolLM3's decoder, as textbook tensor code, and all that is known of its files.

Source: transformers' implementation and the released configuration; layers without positions follow arXiv 2501.18795.
It is a Llama whose every fourth layer knows no positions. All layers are global as released; a configuration may bound
some of them.

Axes:
    B  batch            T  new tokens        D  model width         X  all heads side by side
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from transom.errors import ConfigError
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import (
    USUAL_NEUTRAL,
    USUAL_TENSORS,
    Sizes,
    neighbours_to_halves,
    read_gguf_rope,
)
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import LARGEST, LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.layers import Attention, PreNormLayer, RMSNorm, Rotation, StackedDecoder
from transom.zoo.rope import Rope, rotate, rotation
from transom.zoo.rope_keys import read_rope, rope_buffer, rope_parameters
from transom.zoo.usual_keys import read_usual_sizes, read_windows, usual_sizes, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LocalGlobalConfig):
    """A decoder some of whose layers know no positions.

    Attributes:
        rope: Rotary embedding.
        rotated: Whether each layer rotates queries and keys.
        tied: Whether the head is the table of tokens.

    Raises:
        ConfigError: If layers differ in number, beside what every configuration raises.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps")
    SCALED = ("rope",)

    architecture: str = "smollm3"
    rope: Rope
    rotated: tuple[bool, ...]
    tied: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rotated) != self.num_layers:
            raise ConfigError(f"{self.name}: {len(self.rotated)} layers rotate or not, expected {self.num_layers}")


class SmolLM3Attention(Attention):
    """Attention, rotated or not."""

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_BNTH, k_BKTH = self.split(q_BTX), self.split(k_BTX)
        return (q_BNTH, k_BKTH) if cos_sin is None else (rotate(q_BNTH, *cos_sin), rotate(k_BKTH, *cos_sin))


class SmolLM3(StackedDecoder):
    """The decoder."""

    config: SmolLM3Config

    def __init__(self, config: SmolLM3Config) -> None:
        def layer(config: SmolLM3Config, index: int) -> PreNormLayer:
            return PreNormLayer(config, SmolLM3Attention(config, index))

        super().__init__(config, layer, RMSNorm(config.hidden_size, config.norm_eps), tied=config.tied)

    def rotations(self, positions_T: torch.Tensor) -> list[Rotation | None]:
        cos_sin = rotation(positions_T, self.config.rope, self.config.head_dim)
        return [cos_sin if rotated else None for rotated in self.config.rotated]


# Class defaults of SmolLM3Config, transformers 5.23.
_SIZES = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
}
_PATTERN = 4


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    depth = text.whole("num_hidden_layers", _SIZES["num_hidden_layers"], LARGEST["num_layers"])
    rotated = text.get("no_rope_layers")
    if rotated is None:
        pattern = text.whole("no_rope_layer_interval", _PATTERN)
        rotated = [int((index + 1) % pattern != 0) for index in range(depth)]
    if not isinstance(rotated, list) or len(rotated) != depth or any(flag not in (0, 1) for flag in rotated):
        text.refuse("no_rope_layers", f"expected 0 (no rotation) or 1 for each of {depth} layers")
    return {
        **read_usual_sizes(text, _SIZES),
        **_windows(text, rotated),
        "rope": read_rope(text, 2e6),
        "rotated": tuple(map(bool, rotated)),
        "norm_eps": text.number("rms_norm_eps", 1e-6),
        "tied": text.flag("tie_word_embeddings", True),
    }


def _windows(text: Keys, rotated: list[int]) -> dict[str, Any]:
    """Where the config does not list the types of layers, those without rotation are bounded, if a window is in use."""
    bounded = text.flag("use_sliding_window", False) and text.get("sliding_window") is not None
    values = dict(text.values)
    if values.get("layer_types") is None:
        types = {True: "full_attention", False: "sliding_attention" if bounded else "full_attention"}
        values["layer_types"] = [types[bool(flag)] for flag in rotated]
    if not bounded:
        if "sliding_attention" in values["layer_types"]:
            text.refuse("layer_types", "layers of sliding_attention need use_sliding_window and sliding_window")
        values["sliding_window"] = None
    return read_windows(Keys(text.path, values, text.prefix), _SIZES, _PATTERN)


def _write(config: SmolLM3Config) -> dict[str, Any]:
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **usual_sizes(config),
        **windows(config),
        "use_sliding_window": config.window is not None,
        "no_rope_layers": [int(rotated) for rotated in config.rotated],
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(config.rope),
        "tie_word_embeddings": config.tied,
    }


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"smollm3": None},
    classes=("SmolLM3ForCausalLM",),
    sizes=_SIZES,
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1, None),
        "sliding_window_pattern": (_PATTERN,),
    },
    keys=frozenset(
        {
            "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "layer_types",
            "sliding_window", "use_sliding_window", "no_rope_layers", "no_rope_layer_interval", "tie_word_embeddings",
        }
    ),
    # Stored by transformers, which asks layer_types.
    ignored=frozenset({"max_window_layers"}),
    read=_read,
    write=_write,
    buffer=rope_buffer,
)  # fmt: skip


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """llama.cpp bounds no layer, and takes every fourth for one without positions."""
    keys.agree("attention.scale", sizes.head_dim**-0.5)
    return {
        "layer_kinds": tile("G", sizes.num_layers),
        "window": None,
        "rope": read_gguf_rope(sizes, keys, lines),
        "rotated": tuple((index + 1) % _PATTERN != 0 for index in range(sizes.num_layers)),
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tied": "output.weight" not in sizes.header.tensors,
    }


_GGUF = GGUFFormat(
    name="smollm3",
    neutral=USUAL_NEUTRAL,
    read=_read_gguf,
    tensors={**USUAL_TENSORS, "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    rows=neighbours_to_halves,
    frequencies=True,
)

_PRESETS = (
    # Bounded layers are those without positions, as a configuration with a window has them.
    Preset(
        config=SmolLM3Config(
            name="smollm3-tiny", vocab_size=384, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("GGGL", 4), window=16, rope=Rope(theta=1e4),
            rotated=(True, True, True, False), tied=True, context=512,
        )
    ),
    Preset(
        config=SmolLM3Config(
            name="smollm3-3b", vocab_size=128_256, hidden_size=2048, intermediate_size=11_008, num_heads=16,
            num_kv_heads=4, head_dim=128, layer_kinds=tile("G", 36), window=None, rope=Rope(theta=5e6),
            rotated=(True, True, True, False) * 9, tied=True, context=65_536,
        ),
        hub="HuggingFaceTB/SmolLM3-3B",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="smollm3",
    config=SmolLM3Config,
    build=SmolLM3,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.95},
)
