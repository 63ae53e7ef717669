"""Cohere 2 (Command R7B and Command A), as textbook tensor code, and all that is known of its files.

Source: the Command A report (arXiv 2504.00698) and transformers' implementation. Attention and MLP stand side by side
behind one norm, which subtracts the mean. Three local layers to one global; local layers rotate neighbours, global ones
know no positions.

Axes:
    B  batch            T  new tokens        D  model width         X  all heads side by side
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import USUAL_NEUTRAL, Sizes, read_gguf_rope, read_gguf_windows
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.layers import Attention, GatedMLP, LayerCache, LayerNorm, Rotation, StackedDecoder
from transom.zoo.rope import Rope, rotate_interleaved, rotation
from transom.zoo.rope_keys import read_rope, rope_buffer, rope_parameters
from transom.zoo.usual_keys import read_usual_sizes, read_windows, usual_sizes, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohere2Config(LocalGlobalConfig):
    """A local:global decoder.

    Attributes:
        rope: Rotary embedding of local layers.
        logit_scale: Factor on the logits.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps", "logit_scale")

    architecture: str = "cohere2"
    rope: Rope
    logit_scale: float


class Cohere2Attention(Attention):
    """Attention whose neighbouring pairs are rotated, or none."""

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_BNTH, k_BKTH = self.split(q_BTX), self.split(k_BTX)
        if cos_sin is None:
            return q_BNTH, k_BKTH
        return rotate_interleaved(q_BNTH, *cos_sin), rotate_interleaved(k_BKTH, *cos_sin)


class Layer(nn.Module):
    """One block: attention and MLP read the same normed states."""

    def __init__(self, config: Cohere2Config, index: int) -> None:
        super().__init__()
        self.self_attn = Cohere2Attention(config, index)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, nn.functional.silu)
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, cos_sin: Rotation | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        normed_BTD = self.input_layernorm(x_BTD)
        attended_BTD, cache = self.self_attn(normed_BTD, positions_T, cos_sin, cache)
        return x_BTD + attended_BTD + self.mlp(normed_BTD), cache


class Cohere2(StackedDecoder):
    """The decoder."""

    config: Cohere2Config

    def __init__(self, config: Cohere2Config) -> None:
        super().__init__(config, Layer, LayerNorm(config.hidden_size, config.norm_eps), tied=True)
        self.logit_scale = config.logit_scale

    def rotations(self, positions_T: torch.Tensor) -> list[Rotation | None]:
        cos_sin = rotation(positions_T, self.config.rope, self.config.head_dim)
        return [cos_sin if kind == "local" else None for kind in self.config.layer_kinds]


# Class defaults of Cohere2Config, transformers 5.23.
_SIZES = {
    "vocab_size": 256_000,
    "hidden_size": 8192,
    "intermediate_size": 22_528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}
_PATTERN = 4


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    return {
        **read_usual_sizes(text, _SIZES),
        **read_windows(text, _SIZES, _PATTERN),
        "rope": read_rope(text, 1e4),
        "norm_eps": text.number("layer_norm_eps", 1e-5),
        "logit_scale": text.number("logit_scale", 0.0625),
    }


def _write(config: Cohere2Config) -> dict[str, Any]:
    return {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        **usual_sizes(config),
        **windows(config),
        "layer_norm_eps": config.norm_eps,
        "logit_scale": config.logit_scale,
        "rope_parameters": rope_parameters(config.rope),
        "tie_word_embeddings": True,
    }


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"cohere2": None},
    classes=("Cohere2ForCausalLM",),
    sizes=_SIZES,
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        # transformers stores these and computes the one model.
        "use_parallel_block": (True,),
        "use_gated_activation": (True,),
        "use_embedding_sharing": (True,),
        "use_parallel_embedding": (False,),
        "use_qk_norm": (False,),
        "rotary_pct": (1,),
        "position_embedding_type": ("rope_gptj",),
        "order_of_interleaved_layers": ("local_attn_first",),
        "layer_switch": (_PATTERN,),
    },
    keys=frozenset(
        {
            "num_key_value_heads", "head_dim", "layer_norm_eps", "rope_theta", "rope_parameters", "rope_scaling",
            "layer_types", "sliding_window_pattern", "logit_scale",
        }
    ),
    ignored=frozenset({"_sliding_window_pattern"}),
    read=_read,
    write=_write,
    buffer=rope_buffer,
)  # fmt: skip


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """llama.cpp needs a window, a scale of the logits and an epsilon; a scale of zero is none."""
    keys.size("attention.sliding_window")
    kinds, window = read_gguf_windows(sizes, keys, lines, _PATTERN)
    return {
        "layer_kinds": kinds,
        "window": window,
        "rope": read_gguf_rope(sizes, keys, lines),
        "norm_eps": keys.number("attention.layer_norm_epsilon"),
        "logit_scale": keys.number("logit_scale", zero=True) or 1.0,
    }


_GGUF = GGUFFormat(
    name="cohere2",
    neutral=USUAL_NEUTRAL,
    read=_read_gguf,
    tensors={
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
    },
    rows=lambda config, name: None,
)


def _released(name: str, num_layers: int, **fields: Any) -> Cohere2Config:
    return Cohere2Config(
        name=name, vocab_size=256_000, num_kv_heads=8, head_dim=128, layer_kinds=tile("LLLG", num_layers), window=4096,
        rope=Rope(theta=5e4), norm_eps=1e-5, logit_scale=0.25, **fields,
    )  # fmt: skip


_PRESETS = (
    Preset(
        config=Cohere2Config(
            name="cohere2-tiny", vocab_size=384, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("LLLG", 4), window=16, rope=Rope(theta=1e4), norm_eps=1e-5,
            logit_scale=0.25, context=512,
        )
    ),
    Preset(
        config=_released("command-r7b", 32, hidden_size=4096, intermediate_size=14_336, num_heads=32, context=132_096),
        hub="CohereLabs/c4ai-command-r7b-12-2024",
    ),
    Preset(
        config=_released("command-a", 64, hidden_size=12_288, intermediate_size=36_864, num_heads=96, context=131_072),
        hub="CohereLabs/c4ai-command-a-03-2025",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="cohere2",
    config=Cohere2Config,
    build=Cohere2,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.3},
)
