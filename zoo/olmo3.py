"""OLMo 3's decoder, as textbook tensor code, and all that is known of its files.

Source: the OLMo 2 report (arXiv 2501.00656), from which OLMo 3 differs by its windows, and transformers'
implementation. Norms stand behind attention and MLP only; queries and keys are normed over all of their heads at once.
Three local layers to one global, and only the global ones' rotations are scaled.

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
from transom.zoo.rope import Rope, YarnRope, rotate, rotation
from transom.zoo.rope_keys import read_ropes, rope_parameters
from transom.zoo.usual_keys import read_usual_sizes, read_windows, usual_sizes, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo3Config(LocalGlobalConfig):
    """A local:global decoder.

    Attributes:
        rope_local: Rotary embedding of local layers.
        rope_global: Rotary embedding of global layers.
        tied: Whether the head is the table of tokens.
    """

    POSITIVE = ("rope_local.theta", "rope_local.factor", "rope_global.theta", "rope_global.factor", "norm_eps")

    SCALED = ("rope_global",)

    architecture: str = "olmo3"
    rope_local: Rope
    rope_global: Rope
    tied: bool = False


class Olmo3Attention(Attention):
    """Attention whose queries and keys are normed before they are split into heads."""

    def __init__(self, config: Olmo3Config, index: int) -> None:
        super().__init__(config, index)
        self.q_norm = RMSNorm(config.num_heads * config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.num_kv_heads * config.head_dim, config.norm_eps)

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cos_sin is not None
        q_BNTH, k_BKTH = self.split(self.q_norm(q_BTX)), self.split(self.k_norm(k_BTX))
        return rotate(q_BNTH, *cos_sin), rotate(k_BKTH, *cos_sin)


def _layer(config: Olmo3Config, index: int) -> nn.Module:
    return PostNormLayer(config, Olmo3Attention(config, index), nn.functional.silu)


class Olmo3(StackedDecoder):
    """The decoder."""

    config: Olmo3Config

    def __init__(self, config: Olmo3Config) -> None:
        super().__init__(config, _layer, RMSNorm(config.hidden_size, config.norm_eps), tied=config.tied)

    def rotations(self, positions_T: torch.Tensor) -> list[Rotation | None]:
        ropes = {"local": self.config.rope_local, "global": self.config.rope_global}
        tables = {kind: rotation(positions_T, rope, self.config.head_dim) for kind, rope in ropes.items()}
        return [tables[kind] for kind in self.config.layer_kinds]


# Class defaults of Olmo3Config, transformers 5.23.
_SIZES = {
    "vocab_size": 50_304,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "sliding_window": 4096,
}
_PATTERN, _THETA = 4, 5e5
_THETAS = {"full_attention": ("rope_theta", _THETA), "sliding_attention": ("rope_theta", _THETA)}


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    ropes = read_ropes(text, _THETAS, "full_attention")
    nested = text.mapping("rope_parameters").get("sliding_attention") or {}
    if text.values.get("rope_theta", _THETA) != _THETA and "rope_theta" not in nested:
        text.refuse("rope_theta", "transformers 5 takes it for the full layers only: set rope_parameters in its place")
    return {
        **read_usual_sizes(text, _SIZES),
        **read_windows(text, _SIZES, _PATTERN),
        "rope_local": ropes["sliding_attention"],
        "rope_global": ropes["full_attention"],
        "norm_eps": text.number("rms_norm_eps", 1e-5),
        "tied": text.flag("tie_word_embeddings", False),
    }


def _write(config: Olmo3Config) -> dict[str, Any]:
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        **usual_sizes(config),
        **windows(config),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {
            "sliding_attention": rope_parameters(config.rope_local),
            "full_attention": rope_parameters(config.rope_global),
        },
        "tie_word_embeddings": config.tied,
    }


def _buffer(config: Olmo3Config, name: str) -> torch.Tensor | None:
    if "inv_freq" not in name:
        return None
    rope = config.rope_local if "sliding_attention" in name else config.rope_global
    return rope.frequencies(config.head_dim, dtype=torch.float64)


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"olmo3": None},
    classes=("Olmo3ForCausalLM",),
    sizes=_SIZES,
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        # transformers has no such key, and takes every fourth layer.
        "sliding_window_pattern": (_PATTERN,),
    },
    keys=frozenset(
        {
            "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
            "layer_types", "tie_word_embeddings",
        }
    ),
    read=_read,
    write=_write,
    buffer=_buffer,
)  # fmt: skip


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """llama.cpp's olmo2, which is OLMo 3 too where it has a window; scaling concerns global layers only."""
    rope = read_gguf_rope(sizes, keys, lines)
    local = keys.number("rope.freq_base_swa", rope.theta)
    kinds, window = read_gguf_windows(sizes, keys, lines, _PATTERN)
    return {
        "layer_kinds": kinds,
        "window": window,
        "rope_local": Rope(theta=local),
        "rope_global": rope,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tied": False,
    }


_GGUF = GGUFFormat(
    name="olmo2",
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
)


def _released(name: str, num_layers: int, **sizes: Any) -> Olmo3Config:
    return Olmo3Config(
        name=name, vocab_size=100_278, head_dim=128, layer_kinds=tile("LLLG", num_layers), window=4096,
        rope_local=Rope(theta=_THETA),
        rope_global=YarnRope(theta=_THETA, factor=8.0, original_context=8192, attention_factor=1.2079441541679836),
        norm_eps=1e-6, context=65_536, **sizes,
    )  # fmt: skip


_PRESETS = (
    # Local and global layers, grouped heads, fast, blended and slow pairs within 16.
    Preset(
        config=Olmo3Config(
            name="olmo3-tiny", vocab_size=384, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("LLLG", 4), window=16, rope_local=Rope(theta=1e4),
            rope_global=YarnRope(theta=1e4, factor=8.0, original_context=64), context=512,
        )
    ),
    Preset(
        config=_released("olmo3-7b", 32, hidden_size=4096, intermediate_size=11_008, num_heads=32, num_kv_heads=32),
        hub="allenai/Olmo-3-7B-Instruct",
    ),
    Preset(
        config=_released("olmo3-32b", 64, hidden_size=5120, intermediate_size=27_648, num_heads=40, num_kv_heads=8),
        hub="allenai/Olmo-3-32B-Think",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="olmo3",
    config=Olmo3Config,
    build=Olmo3,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.95},
)
