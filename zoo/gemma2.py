"""Gemma 2's decoder, as textbook tensor code, and all that is known of its files.

Source: the Gemma 2 report (arXiv 2408.00118) and transformers' implementation. Local and global layers take turns.
Scores are bounded before the mask, and logits at the end. Every cache may be as long as the context: the compiler takes
the growth of local layers away.

Axes:
    B  batch            T  new tokens        D  model width      X  all heads side by side
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transom.graphs.weight import Weight
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import Sizes, read_gguf_rope, read_gguf_windows
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.gemma3 import CHAT
from transom.zoo.layers import Attention, RMSNorm, Rotation, SandwichLayer, StackedDecoder
from transom.zoo.rope import Rope, rotate, rotation
from transom.zoo.rope_keys import read_rope, rope_buffer, rope_parameters
from transom.zoo.usual_keys import SIZES, read_sizes, read_windows, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(LocalGlobalConfig):
    """A local:global decoder.

    Attributes:
        rope: Rotary embedding of all layers.
        query_scalar: Scores are divided by its square root.
        attention_softcap: `cap * tanh(scores / cap)` on the scores, or None.
        logit_softcap: The same on the logits.
    """

    POSITIVE = ("rope.theta", "rope.factor", "query_scalar", "attention_softcap", "logit_softcap", "norm_eps")
    SCALED = ("rope",)

    architecture: str = "gemma2"
    rope: Rope
    query_scalar: int
    attention_softcap: float | None = 50.0
    logit_softcap: float | None = 30.0


class Gemma2Attention(Attention):
    """Attention with bounded scores, and a scale that need not follow from the width of heads."""

    def __init__(self, config: Gemma2Config, index: int) -> None:
        super().__init__(config, index)
        self.scale, self.softcap = config.query_scalar**-0.5, config.attention_softcap

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cos_sin is not None
        return rotate(self.split(q_BTX), *cos_sin), rotate(self.split(k_BTX), *cos_sin)


def _layer(config: Gemma2Config, index: int) -> nn.Module:
    return SandwichLayer(config, Gemma2Attention(config, index))


class Gemma2(StackedDecoder):
    """The decoder."""

    config: Gemma2Config

    def __init__(self, config: Gemma2Config) -> None:
        super().__init__(config, _layer, RMSNorm(config.hidden_size, config.norm_eps, offset=1.0), tied=True)
        self.softcap = config.logit_softcap

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        # The factor is rounded to the dtype of the weights, as the released implementations do.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.embed_tokens.weight.dtype).item()
        return super().embed(tokens_BT) * scale

    def rotations(self, positions_T: torch.Tensor) -> list[Rotation | None]:
        return [rotation(positions_T, self.config.rope, self.config.head_dim)] * self.config.num_layers


# Class defaults of Gemma2Config, transformers 5.23.
_SIZES = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_PATTERN, _THETA, _ATTENTION_CAP, _LOGIT_CAP = 2, 1e4, 50.0, 30.0
_ACTIVATION = "gelu_pytorch_tanh"


def _cap(text: Keys, key: str, default: float) -> float | None:
    """A bound; null for none."""
    return None if text.values.get(key, default) is None else text.number(key, default)


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    return {
        **read_sizes(text, SIZES, _SIZES),
        **read_windows(text, _SIZES, _PATTERN),
        "rope": read_rope(text, _THETA),
        "query_scalar": text.whole("query_pre_attn_scalar", _SIZES["query_pre_attn_scalar"]),
        "attention_softcap": _cap(text, "attn_logit_softcapping", _ATTENTION_CAP),
        "logit_softcap": _cap(text, "final_logit_softcapping", _LOGIT_CAP),
        "norm_eps": text.number("rms_norm_eps", 1e-6),
    }


def _write(config: Gemma2Config) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **{key: getattr(config, field) for field, key in SIZES.items()},
        "num_hidden_layers": config.num_layers,
        **windows(config),
        "rope_parameters": rope_parameters(config.rope),
        "query_pre_attn_scalar": config.query_scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": _ACTIVATION,
        "tie_word_embeddings": True,
        # What ends a text stands in generation_config.json.
        "pad_token_id": 0,
        "bos_token_id": 2,
    }


def _buffer(config: Gemma2Config, name: str) -> torch.Tensor | None:
    if name == "embed_tokens.embed_scale":
        return torch.tensor([config.hidden_size**0.5], dtype=torch.float64)
    return rope_buffer(config, name)


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"gemma2": None},
    # A bare trunk is a language model too, as the head is tied to the table.
    classes=("Gemma2ForCausalLM", "Gemma2Model"),
    sizes=_SIZES,
    supported={
        "hidden_activation": (_ACTIVATION,),
        "hidden_act": (_ACTIVATION, None),
        "tie_word_embeddings": (True,),
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, None),
        # transformers has no such key, and takes every second layer.
        "sliding_window_pattern": (_PATTERN,),
    },
    keys=frozenset(
        {
            "attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps", "layer_types", "rope_theta",
            "rope_parameters", "rope_scaling",
        }
    ),
    ignored=frozenset({"sliding_window_size"}),
    read=_read,
    write=_write,
    buffer=_buffer,
)  # fmt: skip


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """What llama.cpp takes when a key is missing: a window of 4,096 on every other layer, and the released bounds.

    The scale is never stored. Only the 27B, known by its 46 layers, scales by the width per query head (144).
    """
    kinds, window = read_gguf_windows(sizes, keys, lines, _PATTERN, window=_SIZES["sliding_window"])
    scalar = sizes.hidden_size // sizes.num_heads if sizes.num_layers == 46 else sizes.head_dim
    keys.agree("attention.scale", scalar**-0.5)
    return {
        "layer_kinds": kinds,
        "window": window,
        "rope": read_gguf_rope(sizes, keys, lines),
        "query_scalar": scalar,
        "attention_softcap": keys.number("attn_logit_softcapping", _ATTENTION_CAP, zero=True) or None,
        "logit_softcap": keys.number("final_logit_softcapping", _LOGIT_CAP, zero=True) or None,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
    }


def _gguf_rows(config: Gemma2Config, name: str) -> Callable[[Weight], Weight] | None:
    """Norms are stored as 1 + w."""
    return (lambda weight: weight.map_rows(lambda rows: rows - 1)) if name.endswith("norm.weight") else None


_GGUF = GGUFFormat(
    name="gemma2",
    neutral={"hidden_activation": (_ACTIVATION,)},
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
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    rows=_gguf_rows,
)


def _released(size: str, num_layers: int, **sizes: Any) -> Preset:
    """A released size (report, Table 1, and the released configurations)."""
    config = Gemma2Config(
        name=f"gemma2-{size}", layer_kinds=tile("LG", num_layers), window=4096, rope=Rope(theta=_THETA),
        context=8192, vocab_size=256_000, **{"head_dim": 256, "query_scalar": 256, **sizes},
    )  # fmt: skip
    return Preset(config=config, hub=f"google/gemma-2-{size}-it")


_PRESETS = (
    # Bounds that random weights feel, and a scale of its own.
    Preset(
        config=Gemma2Config(
            name="gemma2-tiny", vocab_size=384, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("LG", 4), window=16, rope=Rope(theta=_THETA), query_scalar=24,
            attention_softcap=2.0, logit_softcap=5.0, context=512,
        )
    ),
    _released("2b", 26, hidden_size=2304, intermediate_size=9216, num_heads=8, num_kv_heads=4),
    _released("9b", 42, hidden_size=3584, intermediate_size=14_336, num_heads=16, num_kv_heads=8),
    _released(
        "27b", 46, hidden_size=4608, intermediate_size=36_864, num_heads=32, num_kv_heads=16, head_dim=128,
        query_scalar=144,
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="gemma2",
    config=Gemma2Config,
    build=Gemma2,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
    chat=CHAT,
)
