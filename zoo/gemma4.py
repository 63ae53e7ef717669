"""Gemma 4's text decoder, as textbook tensor code, and all that is known of its files.

Source: transformers 5.23, `gemma4`. Beside what Gemma 3 has, heads of global layers are wider than those of local ones,
and in larger models their values are the keys before norm and rotation; the last layers of the small models keep no
keys and values, and read those of the last layer of their kind that does; and a second table of tokens adds something
of its own to every layer. Weights of norms are plain, not around zero.

Axes:
    B  batch            T  new tokens        D  model width      L  layers           P  width of a layer's own embedding
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from transom.errors import ConfigError
from transom.zoo.architecture import Architecture, HuggingFaceFormat, Preset
from transom.zoo.config import AttentionLayer, LayerKind, LocalGlobalConfig, tile
from transom.zoo.config_keys import Keys
from transom.zoo.huggingface import read_ropes, read_sizes, read_windows, rope_parameters, windows
from transom.zoo.layers import Decoder, GatedMLP, LayerCache, RMSNorm, Rotation, attend
from transom.zoo.rope import ProportionalRope, Rope, rotate, rotation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(LocalGlobalConfig):
    """A local:global text decoder. `num_kv_heads` and `head_dim` are those of local layers.

    Attributes:
        rope_local: Rotary embedding of local layers.
        rope_global: Rotary embedding of global layers.
        global_kv_heads: Key/value heads of global layers.
        global_head_dim: Width of a head of global layers.
        keys_as_values: Whether values of global layers are their keys, before norm and rotation.
        shared_layers: How many layers, the last ones, read the keys and values of an earlier one.
        wide_shared: Whether the MLPs of those are twice as wide.
        layer_embedding: Width of what the second table adds to a layer; 0 if there is no such table.
        logit_softcap: `cap * tanh(logits / cap)` on the final logits, or None.

    Raises:
        ConfigError: As `LocalGlobalConfig` does, or if no layer keeps what another one reads.
    """

    POSITIVE = (
        "rope_local.theta", "rope_local.factor", "rope_global.theta", "rope_global.factor", "norm_eps", "logit_softcap",
    )  # fmt: skip
    SIZES = (*LocalGlobalConfig.SIZES, "global_kv_heads", "global_head_dim")
    SCALED = ("rope_global",)

    architecture: str = "gemma4"
    rope_local: Rope
    rope_global: Rope
    global_kv_heads: int
    global_head_dim: int
    keys_as_values: bool = False
    shared_layers: int = 0
    wide_shared: bool = False
    layer_embedding: int = 0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads(self.global_kv_heads, self.global_head_dim)
        if missing := set(self.layer_kinds) - set(self.layer_kinds[: self.unshared]):
            raise ConfigError(
                f"{self.name}: the last {self.shared_layers} layers read the keys and values of others, but no "
                f"{missing.pop()} layer comes before them"
            )

    @property
    def unshared(self) -> int:
        """How many layers, the first ones, keep their own keys and values."""
        return len(self.layer_kinds) - self.shared_layers

    def source(self, index: int) -> int:
        """The layer whose keys and values a layer reads: itself, or the last unshared one of its kind."""
        kinds = self.layer_kinds
        return index if index < self.unshared else max(i for i in range(self.unshared) if kinds[i] == kinds[index])

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """What every layer keeps, first to last."""
        sizes = {
            "local": (self.num_kv_heads, self.head_dim, self.window),
            "global": (self.global_kv_heads, self.global_head_dim, None),
        }
        return tuple(
            AttentionLayer(kv_heads=heads if index < self.unshared else 0, key_width=H, value_width=H, window=window)
            for index, kind in enumerate(self.layer_kinds)
            for heads, H, window in (sizes[kind],)
        )


_gelu = functools.partial(nn.functional.gelu, approximate="tanh")


class Attention(nn.Module):
    """Grouped-query attention whose queries, keys and values are normed; over its own keys or an earlier layer's."""

    def __init__(self, config: Gemma4Config, index: int) -> None:
        super().__init__()
        layer, D, N, eps = config.layers[index], config.hidden_size, config.num_heads, config.norm_eps
        K, H = layer.kv_heads, layer.key_width
        self.window, self.head_dim = layer.window, H
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.q_norm = RMSNorm(H, eps)
        # Scores have no factor: trained weights are small.
        self.q_norm.neutral = {"weight": H**-0.5}
        if K:
            self.k_proj = nn.Linear(D, K * H, bias=False)
            self.k_norm, self.v_norm = RMSNorm(H, eps), RMSNorm(None, eps)
            if not (config.keys_as_values and layer.kind == "global"):
                self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: Rotation,
        cache: LayerCache | None,
        shared: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(*x.shape[:2], -1, self.head_dim)

        q_BNTH = rotate(self.q_norm(heads(self.q_proj(x_BTD))).transpose(1, 2), *cos_sin)
        if shared is not None:
            # Its new tokens are written already.
            attended_BTD, written = attend(q_BNTH, *shared, None, positions_T, scale=1.0, window=self.window)
            return self.o_proj(attended_BTD), written
        k_BTKH = heads(self.k_proj(x_BTD))
        v_BTKH = heads(self.v_proj(x_BTD)) if hasattr(self, "v_proj") else k_BTKH
        k_BKTH = rotate(self.k_norm(k_BTKH).transpose(1, 2), *cos_sin)
        v_BKTH = self.v_norm(v_BTKH).transpose(1, 2)
        attended_BTD, written = attend(q_BNTH, k_BKTH, v_BKTH, cache, positions_T, scale=1.0, window=self.window)
        return self.o_proj(attended_BTD), written


class Layer(nn.Module):
    """One block; norms stand before and after attention and MLP, and after what the layer's own embedding adds."""

    neutral: ClassVar[Mapping[str, float]] = {"layer_scalar": 1.0}

    def __init__(self, config: Gemma4Config, index: int) -> None:
        super().__init__()
        D, P, eps = config.hidden_size, config.layer_embedding, config.norm_eps
        wide = config.wide_shared and index >= config.unshared
        self.self_attn = Attention(config, index)
        self.mlp = GatedMLP(D, config.intermediate_size * (2 if wide else 1), _gelu)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)
        if P:
            self.per_layer_input_gate = nn.Linear(D, P, bias=False)
            self.per_layer_projection = nn.Linear(P, D, bias=False)
            self.post_per_layer_input_norm = RMSNorm(D, eps)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(
        self,
        x_BTD: torch.Tensor,
        own_BTP: torch.Tensor | None,
        positions_T: torch.Tensor,
        cos_sin: Rotation,
        cache: LayerCache | None,
        shared: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        attended_BTD, written = self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_sin, cache, shared)
        x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
        x_BTD = x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD)))
        if own_BTP is not None:
            gated_BTP = _gelu(self.per_layer_input_gate(x_BTD)) * own_BTP
            x_BTD = x_BTD + self.post_per_layer_input_norm(self.per_layer_projection(gated_BTP))
        return x_BTD * self.layer_scalar, written


class Gemma4(Decoder):
    """The decoder."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config, self.softcap = config, config.logit_softcap
        D, L, P = config.hidden_size, config.num_layers, config.layer_embedding
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(L))
        self.norm = RMSNorm(D, config.norm_eps)
        if P:
            self.embed_tokens_per_layer = nn.Embedding(config.vocab_size, L * P)
            self.per_layer_model_projection = nn.Linear(D, L * P, bias=False)
            self.per_layer_projection_norm = RMSNorm(P, config.norm_eps)

    def layer_embeddings(self, tokens_BT: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """What every layer is given of its own, side by side: of the tokens, and of their embeddings, [B, T, L * P]."""
        shape = (*tokens_BT.shape, self.config.num_layers, self.config.layer_embedding)
        of_tokens_BTLP = _look_up(self.embed_tokens_per_layer, tokens_BT, self.config.layer_embedding).view(shape)
        projected_BTLP = (self.per_layer_model_projection(x_BTD) * self.config.hidden_size**-0.5).view(shape)
        embedded_BTLP: torch.Tensor = (self.per_layer_projection_norm(projected_BTLP) + of_tokens_BTLP) * 2.0**-0.5
        return embedded_BTLP.flatten(2)

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        config = self.config
        positions_T = start + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rotations = {
            "local": rotation(positions_T, config.rope_local, config.head_dim),
            "global": rotation(positions_T, config.rope_global, config.global_head_dim),
        }
        x_BTD = _look_up(self.embed_tokens, tokens_BT, config.hidden_size)
        own: tuple[torch.Tensor | None, ...] = (None,) * config.num_layers
        if config.layer_embedding:
            own = torch.split(self.layer_embeddings(tokens_BT, x_BTD), config.layer_embedding, dim=-1)
        written: list[LayerCache] = []
        for index, (layer, kind) in enumerate(zip(self.layers, config.layer_kinds, strict=True)):
            owns = index < config.unshared
            x_BTD, after = layer(
                x_BTD,
                own[index],
                positions_T,
                rotations[kind],
                caches[index] if owns and caches is not None else None,
                None if owns else written[config.source(index)],
            )
            if owns:
                written.append(after)
        return self.norm(x_BTD), written


def _look_up(table: nn.Embedding, tokens_BT: torch.Tensor, width: int) -> torch.Tensor:
    # The factor is rounded to the dtype of the weights, as the released implementations do.
    rows: torch.Tensor = table(tokens_BT) * torch.tensor(width**0.5, dtype=table.weight.dtype).item()
    return rows


# Class defaults of Gemma4TextConfig, transformers 5.23, and where those of Gemma4UnifiedTextConfig differ.
_SIZES = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 512,
}
_UNIFIED_SIZES = {**_SIZES, "sliding_window": 1024, "max_position_embeddings": 262_144}
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
}
_GLOBAL_HEAD_DIM, _LAYER_EMBEDDING, _EPS, _PATTERN = 512, 256, 1e-6, 6
_ROPES = {
    "sliding_attention": Rope(theta=1e4),
    "full_attention": ProportionalRope(theta=1e6, fraction=0.25),
}
_ACTIVATION = "gelu_pytorch_tanh"


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    unified = any("unified" in str(keys.get("model_type")) for keys in (text, outer))
    defaults = _UNIFIED_SIZES if unified else _SIZES
    sizes = {**read_sizes(text, _FIELDS, defaults), **read_windows(text, defaults, _PATTERN)}
    # Whatever the config says, as in transformers.
    sizes["layer_kinds"] = kinds = (*sizes["layer_kinds"][:-1], "global")
    ropes = dict(_ROPES)
    if text.get("rope_parameters") is not None:
        ropes |= read_ropes(text, {name: ("", rope.theta) for name, rope in _ROPES.items()}, "")
    layer_embedding = _count(text, "hidden_size_per_layer_input", 0 if unified else _LAYER_EMBEDDING)
    rows = text.whole("vocab_size_per_layer_input", _SIZES["vocab_size"])
    if layer_embedding and rows != sizes["vocab_size"]:
        text.refuse("vocab_size_per_layer_input", f"expected as many rows as in vocab_size, {sizes['vocab_size']}")
    return {
        **sizes,
        **_global_heads(text, kinds, sizes),
        "rope_local": ropes["sliding_attention"],
        "rope_global": ropes["full_attention"],
        "shared_layers": _count(text, "num_kv_shared_layers", 0, len(kinds) - 1),
        "wide_shared": _flag(text, "use_double_wide_mlp"),
        "layer_embedding": layer_embedding,
        "norm_eps": text.number("rms_norm_eps", _EPS),
        "logit_softcap": (
            None if text.get("final_logit_softcapping") is None else text.number("final_logit_softcapping", 0)
        ),
    }


def _count(text: Keys, key: str, default: int, most: int = 2**31 - 1) -> int:
    """A whole number that may be zero; the default if it is absent or null."""
    return 0 if (text.get(key), default) in ((0, default), (None, 0)) else text.whole(key, default, most)


def _flag(text: Keys, key: str) -> bool:
    if not isinstance(value := text.values.get(key, False), bool):
        text.refuse(key, "expected true or false")
    return bool(value)


def _global_heads(text: Keys, kinds: tuple[LayerKind, ...], sizes: dict[str, int]) -> dict[str, Any]:
    """What global layers have of their own; transformers writes it layer by layer, released configs by name."""
    own = {"head_dim": text.whole("global_head_dim", _GLOBAL_HEAD_DIM), "num_key_value_heads": sizes["num_kv_heads"]}
    keys_as_values = _flag(text, "attention_k_eq_v")
    if keys_as_values and text.get("num_global_key_value_heads") is not None:
        own["num_key_value_heads"] = text.whole("num_global_key_value_heads", 1)
    if by_layer := text.mapping("per_layer_config"):
        first = next(iter(by_layer.values()))
        wanted = [index for index, kind in enumerate(kinds) if kind == "global"]
        alike = isinstance(first, dict) and first.keys() <= own.keys() and all(x == first for x in by_layer.values())
        if not alike or sorted(int(key) if key.isdecimal() else -1 for key in by_layer) != wanted:
            text.refuse("per_layer_config", f"expected one head_dim and num_key_value_heads for all of layers {wanted}")
        inner = Keys(text.path, first, f"{text.prefix}per_layer_config.")
        own = {"head_dim": sizes["head_dim"], "num_key_value_heads": sizes["num_kv_heads"]}
        own |= {key: inner.whole(key, 1) for key in first}
    return {
        "keys_as_values": keys_as_values,
        "global_head_dim": own["head_dim"],
        "global_kv_heads": own["num_key_value_heads"],
    }


def _write(config: Gemma4Config) -> dict[str, Any]:
    heads = {"head_dim": config.global_head_dim, "num_key_value_heads": config.global_kv_heads}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        **windows(config),
        "per_layer_config": {str(i): heads for i, kind in enumerate(config.layer_kinds) if kind == "global"},
        "attention_k_eq_v": config.keys_as_values,
        "num_kv_shared_layers": config.shared_layers,
        "use_double_wide_mlp": config.wide_shared,
        "hidden_size_per_layer_input": config.layer_embedding,
        "vocab_size_per_layer_input": config.vocab_size,
        "rope_parameters": {
            "sliding_attention": rope_parameters(config.rope_local),
            "full_attention": rope_parameters(config.rope_global),
        },
        "final_logit_softcapping": config.logit_softcap,
        "hidden_activation": _ACTIVATION,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
    }


def _buffer(config: Gemma4Config, name: str) -> torch.Tensor | None:
    if name == "embed_tokens.embed_scale":
        return torch.tensor([config.hidden_size**0.5], dtype=torch.float64)
    if "inv_freq" not in name:
        return None
    if "sliding" in name:
        return config.rope_local.frequencies(config.head_dim, dtype=torch.float64)
    return config.rope_global.frequencies(config.global_head_dim, dtype=torch.float64)


def _unread(config: Gemma4Config, name: str) -> bool:
    """Released checkpoints hold keys and values of layers that share others'."""
    path = name.split(".")
    return (
        path[0] == "layers"
        and path[1].isdigit()
        and config.unshared <= int(path[1]) < config.num_layers
        and path[2:-1] in [["self_attn", part] for part in ("k_proj", "v_proj", "k_norm", "v_norm")]
    )


_HUGGINGFACE = HuggingFaceFormat(
    model_types={
        "gemma4_text": None, "gemma4": "text_config", "gemma4_unified_text": None, "gemma4_unified": "text_config",
    },
    classes=tuple(
        f"Gemma4{unified}{kind}" for unified in ("", "Unified")
        for kind in ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model")
    ),
    sizes=_SIZES,
    supported={
        "hidden_activation": (_ACTIVATION,),
        "tie_word_embeddings": (True,),
        "attention_bias": (False,),
        # Text sees what came before it; "vision" is about images only.
        "use_bidirectional_attention": (None, "vision"),
        "enable_moe_block": (False,),
    },
    keys=frozenset(
        {
            "rms_norm_eps", "layer_types", "sliding_window_pattern", "rope_parameters", "rope_scaling",
            "final_logit_softcapping", "global_head_dim", "num_global_key_value_heads", "per_layer_config",
            "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input",
            "vocab_size_per_layer_input",
        }
    ),
    ignored=frozenset(
        {
            "vision_config", "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id",
            "boa_token_id", "eoa_token_index", "audio_token_id", "num_experts", "top_k_experts",
            "moe_intermediate_size",
        }
    ),
    read=_read,
    write=_write,
    buffer=_buffer,
    unread=_unread,
)  # fmt: skip

# Turns of system, user and model, as ai.google.dev describes them.
_CHAT = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% set role = {'system': 'system', 'user': 'user', 'assistant': 'model', 'model': 'model'}.get(turn.role) %}"
    "{% if not role or (role == 'system' and not loop.first) %}"
    "{{ raise_exception('message ' ~ loop.index ~ ' has role \\'' ~ turn.role ~ '\\': "
    "after an optional system message come user and assistant') }}"
    "{% endif %}"
    "<|turn>{{ role }}\n{{ turn.content.strip() }}<turn|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def _released(name: str, pattern: str, num_layers: int, **sizes: Any) -> Gemma4Config:
    """A released size."""
    return Gemma4Config(
        name=name,
        layer_kinds=tile(pattern, num_layers),
        rope_local=_ROPES["sliding_attention"],
        rope_global=_ROPES["full_attention"],
        logit_softcap=30.0,
        **{
            "vocab_size": 262_144, "head_dim": 256, "global_head_dim": 512, "window": 1024, "context": 262_144, **sizes,
        },
    )  # fmt: skip


_SMALL: dict[str, Any] = {"num_heads": 8, "window": 512, "context": 131_072, "layer_embedding": 256}
_PRESETS = (
    # Two layers of either kind that share, twice as wide; slots of global layers differ in width.
    Preset(
        config=_released(
            "gemma4-tiny", "LLG", 6, vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=16, global_kv_heads=2, global_head_dim=32, window=16, context=512, layer_embedding=32,
            shared_layers=3, wide_shared=True,
        )
    ),
    Preset(
        config=_released("gemma4-e2b", "LLLLG", 35, hidden_size=1536, intermediate_size=6144, num_kv_heads=1,
                         global_kv_heads=1, shared_layers=20, wide_shared=True, **_SMALL),
        hub="google/gemma-4-E2B-it",
    ),
    Preset(
        config=_released("gemma4-e4b", "LLLLLG", 42, hidden_size=2560, intermediate_size=10_240, num_kv_heads=2,
                         global_kv_heads=2, shared_layers=18, **_SMALL),
        hub="google/gemma-4-E4B-it",
    ),
    Preset(
        config=_released("gemma4-12b", "LLLLLG", 48, hidden_size=3840, intermediate_size=15_360, num_heads=16,
                         num_kv_heads=8, global_kv_heads=1, keys_as_values=True),
        hub="google/gemma-4-12B-it",
    ),
    Preset(
        config=_released("gemma4-31b", "LLLLLG", 60, hidden_size=5376, intermediate_size=21_504, num_heads=32,
                         num_kv_heads=16, global_kv_heads=4, keys_as_values=True),
        hub="google/gemma-4-31B-it",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="gemma4",
    config=Gemma4Config,
    build=Gemma4,
    huggingface=_HUGGINGFACE,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
    chat=_CHAT,
)
