"""gpt-oss, as textbook tensor code, and all that is known of its files.

Source: the gpt-oss model card (arXiv 2508.10925), and transformers 5.23, `gpt_oss`. Every other layer is local,
softmaxes have a sink that takes attention away, and MLPs are mixtures of experts.

Axes:
    B  batch            T  new tokens        D  model width      E  experts
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import Sizes, read_gguf_windows
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.checkpoints.stacked import Stacked
from transom.zoo.config import LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.experts import Experts, clamped_swiglu, route
from transom.zoo.layers import LayerCache, RMSNorm, Rotation, StackedDecoder, attend
from transom.zoo.rope import Rope, YarnRope, rotate, rotation
from transom.zoo.rope_keys import read_ropes, rope_buffer, rope_parameters
from transom.zoo.usual_keys import read_usual_sizes, read_windows, usual_sizes, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(LocalGlobalConfig):
    """A decoder of local and global layers and experts.

    Attributes:
        rope: Rotary embedding of all layers.
        experts: In every layer.
        chosen: Experts of each token.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps", "experts", "chosen")
    SCALED = ("rope",)

    architecture: str = "gpt_oss"
    rope: Rope
    experts: int
    chosen: int


class Attention(nn.Module):
    """Grouped-query attention with biases, and a sink for every query head."""

    def __init__(self, config: GptOssConfig, index: int) -> None:
        super().__init__()
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim, self.window = H, config.layers[index].window
        self.q_proj = nn.Linear(D, N * H)
        self.k_proj = nn.Linear(D, K * H)
        self.v_proj = nn.Linear(D, K * H)
        self.o_proj = nn.Linear(N * H, D)
        self.sinks = nn.Parameter(torch.empty(N))

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, cos_sin: Rotation, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        q_BNTH, k_BKTH, v_BKTH = (
            projection(x_BTD).view(*x_BTD.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended_BTX, cache = attend(
            rotate(q_BNTH, *cos_sin),
            rotate(k_BKTH, *cos_sin),
            v_BKTH,
            cache,
            positions_T,
            scale=self.head_dim**-0.5,
            window=self.window,
            sinks_N=self.sinks,
        )
        return self.o_proj(attended_BTX), cache


class MLP(nn.Module):
    """A router and its experts."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.chosen = config.chosen
        self.router = nn.Linear(config.hidden_size, config.experts)
        self.experts = Experts(
            config.experts, config.hidden_size, config.intermediate_size, clamped_swiglu, biases=True
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out_BTD: torch.Tensor = self.experts(x_BTD, *route(self.router(x_BTD), self.chosen))
        return out_BTD


class Layer(nn.Module):
    """One block; norms stand before attention and experts."""

    def __init__(self, config: GptOssConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, cos_sin: Rotation, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_sin, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class GptOss(StackedDecoder):
    """The decoder."""

    config: GptOssConfig

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__(config, Layer, RMSNorm(config.hidden_size, config.norm_eps), tied=False)

    def rotations(self, positions_T: torch.Tensor) -> Sequence[Rotation]:
        """The same for every layer."""
        return [rotation(positions_T, self.config.rope, self.config.head_dim)] * len(self.layers)


# Class defaults of GptOssConfig, transformers 5.23.
_SIZES = {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "sliding_window": 128,
}
_EXPERTS, _CHOSEN = 128, 4
_THETA, _ORIGINAL = 1.5e5, 4096


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    if text.get("rope_parameters") is None and text.get("rope_scaling") is None:
        text.refuse("rope_parameters", "expected those of its YaRN, as classes differ in what they take for them")
    kinds = read_windows(text, _SIZES, 2)
    return {
        **read_usual_sizes(text, _SIZES),
        **kinds,
        "rope": read_ropes(text, {"": ("rope_theta", _THETA)}, "")[""],
        "norm_eps": text.number("rms_norm_eps", 1e-5),
        "experts": text.whole("num_local_experts", _EXPERTS),
        "chosen": text.whole("num_experts_per_tok", _CHOSEN),
    }


def _write(config: GptOssConfig) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **usual_sizes(config),
        **windows(config),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(config.rope),
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.chosen,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }


def _stacked(config: GptOssConfig, name: str) -> Stacked | None:
    """Files hold the experts' matrices transposed, and gates and ups by turns."""
    if ".experts." not in name:
        return None
    return Stacked(count=config.experts, transposed=not name.endswith("_bias"), by_turns=".gate_up_proj" in name)


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"gpt_oss": None},
    classes=("GptOssForCausalLM",),
    sizes=_SIZES,
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (True,),
        "tie_word_embeddings": (False,),
        "swiglu_limit": (7.0,),
        "swiglu_alpha": (1.702,),
        "experts_per_token": (None, 4),
        # transformers has no such key, and takes every second layer.
        "sliding_window_pattern": (2,),
    },
    keys=frozenset(
        {
            "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "layer_types", "num_local_experts",
            "num_experts_per_tok",
        }
    ),
    ignored=frozenset({"initial_context_length", "output_router_logits", "router_aux_loss_coef"}),
    packed=("mxfp4",),
    stacked=_stacked,
    read=_read,
    write=_write,
    buffer=rope_buffer,
)  # fmt: skip


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """YaRN, whose ramp does not begin and end at whole pairs, which no key says; every other layer is local."""
    keys.agree("attention.scale", sizes.head_dim**-0.5)
    keys.only("rope.scaling.type", ("yarn",), required=True)
    rope = YarnRope(
        theta=keys.number("rope.freq_base", _THETA),
        factor=keys.number("rope.scaling.factor"),
        original_context=keys.size("rope.scaling.original_context_length", _ORIGINAL),
        truncate=False,
    )
    kinds, window = read_gguf_windows(sizes, keys, lines, 2)
    return {
        "layer_kinds": kinds,
        "window": window,
        "intermediate_size": keys.size("expert_feed_forward_length", sizes.intermediate_size),
        "rope": rope,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "experts": keys.size("expert_count"),
        "chosen": keys.size("expert_used_count"),
    }


_GGUF = GGUFFormat(
    name="gpt-oss",
    neutral={},
    read=_read_gguf,
    tensors={
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.sinks": "attn_sinks.weight",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "mlp.router": "ffn_gate_inp",
        "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
        "mlp.experts.down_proj": "ffn_down_exps.weight",
        "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    },
    rows=lambda config, name: None,
)


def _released(name: str, layers: int, experts: int) -> GptOssConfig:
    return GptOssConfig(
        name=name, vocab_size=201_088, hidden_size=2880, intermediate_size=2880, num_heads=64, num_kv_heads=8,
        head_dim=64, layer_kinds=tile("LG", layers), window=128, experts=experts, chosen=4, norm_eps=1e-5,
        context=131_072, rope=YarnRope(theta=_THETA, factor=32.0, original_context=_ORIGINAL, truncate=False),
    )  # fmt: skip


_PRESETS = (
    # Local and global layers, a scaling that begins within a test's positions, experts that some tokens share.
    Preset(
        config=GptOssConfig(
            name="gpt-oss-tiny", vocab_size=512, hidden_size=64, intermediate_size=32, num_heads=4, num_kv_heads=2,
            head_dim=16, layer_kinds=tile("LG", 4), window=16, experts=4, chosen=2, norm_eps=1e-5, context=512,
            rope=YarnRope(theta=1e4, factor=8.0, original_context=64, truncate=False),
        )
    ),
    Preset(config=_released("gpt-oss-20b", 24, 32), hub="openai/gpt-oss-20b"),
    Preset(config=_released("gpt-oss-120b", 36, 128), hub="openai/gpt-oss-120b"),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="gpt_oss",
    config=GptOssConfig,
    build=GptOss,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 1.0, "top_p": 1.0},
)
