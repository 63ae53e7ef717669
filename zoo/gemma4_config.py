"""Gemma 4's configuration: the text decoder's sizes, and how a `config.json` says them.

Source: transformers 5.23, `gemma4`. What is computed with them stands in `gemma4`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from transom.errors import ConfigError
from transom.zoo.architecture import HuggingFaceFormat
from transom.zoo.checkpoints.stacked import Stacked
from transom.zoo.config import AttentionLayer, LayerKind, LocalGlobalConfig
from transom.zoo.config_keys import Keys
from transom.zoo.rope import ProportionalRope, Rope
from transom.zoo.rope_keys import read_ropes, rope_parameters
from transom.zoo.usual_keys import read_sizes, read_windows, windows


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
        experts: Beside the MLP of every layer; 0 if there are none.
        chosen: Experts of each token.
        expert_size: Width of an expert.
        logit_softcap: `cap * tanh(logits / cap)` on the final logits, or None.

    Raises:
        ConfigError: As `LocalGlobalConfig` does, if no layer keeps what another one reads, or more experts are chosen
            than there are.
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
    experts: int = 0
    chosen: int = 0
    expert_size: int = 0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads(self.global_kv_heads, self.global_head_dim)
        if self.experts:
            for name in ("experts", "chosen", "expert_size"):
                self._check_size(name)
        if self.chosen > self.experts:
            raise ConfigError(f"{self.name}: {self.chosen} of {self.experts} experts are chosen, expected at most all")
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
_EXPERTS = {"experts": "num_experts", "chosen": "top_k_experts", "expert_size": "moe_intermediate_size"}
_GLOBAL_HEAD_DIM, _LAYER_EMBEDDING, _EPS, _PATTERN = 512, 256, 1e-6, 6
ROPES = {
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
    ropes = dict(ROPES)
    if text.get("rope_parameters") is not None:
        ropes |= read_ropes(text, {name: ("", rope.theta) for name, rope in ROPES.items()}, "")
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
        "wide_shared": text.flag("use_double_wide_mlp", False),
        "layer_embedding": layer_embedding,
        **_experts(text),
        "norm_eps": text.number("rms_norm_eps", _EPS),
        "logit_softcap": (
            None if text.get("final_logit_softcapping") is None else text.number("final_logit_softcapping", 0)
        ),
    }


def _count(text: Keys, key: str, default: int, most: int = 2**31 - 1) -> int:
    """A whole number that may be zero; the default if it is absent or null."""
    return 0 if (text.get(key), default) in ((0, default), (None, 0)) else text.whole(key, default, most)


def _experts(text: Keys) -> dict[str, int]:
    if not text.flag("enable_moe_block", False):
        return {}
    return {field: text.whole(key, 0) for field, key in _EXPERTS.items()}


def _global_heads(text: Keys, kinds: tuple[LayerKind, ...], sizes: dict[str, int]) -> dict[str, Any]:
    """What global layers have of their own; transformers writes it layer by layer, released configs by name."""
    own = {"head_dim": text.whole("global_head_dim", _GLOBAL_HEAD_DIM), "num_key_value_heads": sizes["num_kv_heads"]}
    keys_as_values = text.flag("attention_k_eq_v", False)
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
        "enable_moe_block": config.experts > 0,
        **({key: getattr(config, field) for field, key in _EXPERTS.items()} if config.experts else {}),
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


def _stacked(config: Gemma4Config, name: str) -> Stacked | None:
    return Stacked(count=config.experts) if ".experts." in name else None


HUGGINGFACE = HuggingFaceFormat(
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
        # transformers has no such key, and takes every sixth layer.
        "sliding_window_pattern": (_PATTERN,),
    },
    keys=frozenset(
        {
            "rms_norm_eps", "layer_types", "rope_parameters", "rope_scaling",
            "final_logit_softcapping", "global_head_dim", "num_global_key_value_heads", "per_layer_config",
            "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input",
            "vocab_size_per_layer_input", "enable_moe_block", *_EXPERTS.values(),
        }
    ),
    ignored=frozenset(
        {
            "vision_config", "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id",
            "boa_token_id", "eoa_token_index", "audio_token_id",
        }
    ),
    stacked=_stacked,
    read=_read,
    write=_write,
    buffer=_buffer,
    unread=_unread,
)  # fmt: skip
