"""EXAONE 4.0's decoder, as textbook tensor code, and all that is known of its files.

Source: the EXAONE 4.0 report (arXiv 2507.11407) and transformers' implementation. Norms stand behind attention and MLP
only; queries and keys are normed by head. The 32B has three local layers to one global, and its global layers know no
positions; the 1.2B has global layers alone, which are rotated.

Axes:
    B  batch            T  new tokens        X  all heads side by side
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import USUAL_NEUTRAL, USUAL_TENSORS, Sizes, read_gguf_rope, read_gguf_windows
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.layers import Attention, PostNormLayer, RMSNorm, Rotation, StackedDecoder
from transom.zoo.rope import Llama3Rope, Rope, rotate, rotation
from transom.zoo.rope_keys import read_rope, rope_buffer, rope_parameters
from transom.zoo.usual_keys import read_usual_sizes, read_windows, usual_sizes, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exaone4Config(LocalGlobalConfig):
    """A local:global decoder, or one of global layers.

    Attributes:
        rope: Rotary embedding of local layers; of all layers, if the model has no window.
        tied: Whether the head is the table of tokens.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps")

    architecture: str = "exaone4"
    rope: Rope
    tied: bool


class Exaone4Attention(Attention):
    """Attention with QK-norm by head, rotated or not."""

    def __init__(self, config: Exaone4Config, index: int) -> None:
        super().__init__(config, index)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_BNTH, k_BKTH = self.q_norm(self.split(q_BTX)), self.k_norm(self.split(k_BTX))
        return (q_BNTH, k_BKTH) if cos_sin is None else (rotate(q_BNTH, *cos_sin), rotate(k_BKTH, *cos_sin))


def _layer(config: Exaone4Config, index: int) -> nn.Module:
    return PostNormLayer(config, Exaone4Attention(config, index), nn.functional.silu)


class Exaone4(StackedDecoder):
    """The decoder."""

    config: Exaone4Config

    def __init__(self, config: Exaone4Config) -> None:
        super().__init__(config, _layer, RMSNorm(config.hidden_size, config.norm_eps), tied=config.tied)

    def rotations(self, positions_T: torch.Tensor) -> list[Rotation | None]:
        cos_sin = rotation(positions_T, self.config.rope, self.config.head_dim)
        everywhere = self.config.window is None
        return [cos_sin if everywhere or kind == "local" else None for kind in self.config.layer_kinds]


# Class defaults of Exaone4Config, transformers 5.23.
_SIZES = {
    "vocab_size": 102_400,
    "hidden_size": 4096,
    "intermediate_size": 16_384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "sliding_window": 4096,
}
_PATTERN = 4


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    return {
        **read_usual_sizes(text, _SIZES),
        **read_windows(text, _SIZES, _PATTERN),
        "rope": read_rope(text, 1e4),
        "norm_eps": text.number("rms_norm_eps", 1e-5),
        "tied": text.flag("tie_word_embeddings", False),
    }


def _write(config: Exaone4Config) -> dict[str, Any]:
    return {
        "architectures": ["Exaone4ForCausalLM"],
        "model_type": "exaone4",
        **usual_sizes(config),
        **windows(config),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(config.rope),
        "tie_word_embeddings": config.tied,
    }


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"exaone4": None},
    classes=("Exaone4ForCausalLM",),
    sizes=_SIZES,
    supported={"hidden_act": ("silu",)},
    keys=frozenset(
        {
            "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "layer_types",
            "sliding_window_pattern", "tie_word_embeddings",
        }
    ),
    read=_read,
    write=_write,
    buffer=rope_buffer,
)  # fmt: skip


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """llama.cpp takes a model for local:global by its 64 layers, and every fourth for global; a file may say both."""
    if sizes.num_layers == 64:
        keys.values.setdefault("attention.sliding_window", 4096)
    pattern = _PATTERN if "attention.sliding_window" in keys else 1
    kinds, window = read_gguf_windows(sizes, keys, lines, pattern)
    return {
        "layer_kinds": kinds,
        "window": window,
        "rope": read_gguf_rope(sizes, keys, lines),
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tied": "output.weight" not in sizes.header.tensors,
    }


_GGUF = GGUFFormat(
    name="exaone4",
    neutral=USUAL_NEUTRAL,
    read=_read_gguf,
    tensors={
        **USUAL_TENSORS,
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    rows=lambda config, name: None,
    frequencies=True,
)


def _released(name: str, **fields: Any) -> Exaone4Config:
    rope = Llama3Rope(theta=1e6, factor=16.0)
    return Exaone4Config(name=name, vocab_size=102_400, num_kv_heads=8, rope=rope, norm_eps=1e-5, **fields)


_PRESETS = (
    Preset(
        config=Exaone4Config(
            name="exaone4-tiny", vocab_size=384, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("LLLG", 4), window=16,
            rope=Llama3Rope(theta=1e4, factor=8.0, original_context=64), tied=False, context=512,
        )
    ),
    Preset(
        config=_released("exaone4-1.2b", hidden_size=2048, intermediate_size=4096, num_heads=32, head_dim=64,
                         layer_kinds=tile("G", 30), window=None, tied=True, context=65_536),
        hub="LGAI-EXAONE/EXAONE-4.0-1.2B",
    ),
    Preset(
        config=_released("exaone4-32b", hidden_size=5120, intermediate_size=27_392, num_heads=40, head_dim=128,
                         layer_kinds=tile("LLLG", 64), window=4096, tied=False, context=131_072),
        hub="LGAI-EXAONE/EXAONE-4.0-32B",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="exaone4",
    config=Exaone4Config,
    build=Exaone4,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.95},
)
