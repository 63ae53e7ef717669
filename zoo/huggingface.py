"""Hugging Face's `config.json`, read and written without their library.

Two generations exist. Up to transformers 4 a config holds `rope_theta`, `rope_local_base_freq`, `rope_scaling` and
`sliding_window_pattern`; from 5 on `rope_parameters` and `layer_types`, each per kind of layer. Early Gemma 3 configs
are sparse: whatever equals the class default is left out, so the defaults below are part of the format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transom.graphs.errors import ConfigError
from transom.zoo.config import DecoderConfig, LayerKind, Rope

_MODEL_TYPES = {"gemma3_text": "gemma3", "gemma3": "gemma3"}
_LAYER_KINDS: dict[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}
_LAYER_TYPES = {kind: name for name, kind in _LAYER_KINDS.items()}

# Class defaults of Gemma3TextConfig, transformers 5.23.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": False,
}
_THETA_GLOBAL, _THETA_LOCAL, _PATTERN = 1e6, 1e4, 6


def read_config(folder: Path) -> DecoderConfig:
    """Read the text decoder of a checkpoint folder's `config.json`; the name is the folder's.

    Raises:
        ConfigError: If the file is missing or corrupt, or describes a model that the zoo does not hold.
    """
    path = folder / "config.json"
    outer = _load(path)
    model_type = outer.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise ConfigError(f"{path}: unknown model_type {model_type!r}: known are {', '.join(_MODEL_TYPES)}")
    text = outer if model_type == "gemma3_text" else outer.get("text_config") or {}
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config must be an object, got {text!r}")
    values = _DEFAULTS | {key: text[key] for key in _DEFAULTS if text.get(key) is not None}
    if text is not outer and outer.get("tie_word_embeddings") is not None:
        values["tie_word_embeddings"] = values["tie_word_embeddings"] and outer["tie_word_embeddings"]
    for key, only in (
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("tie_word_embeddings", True),
        ("attention_bias", False),
        ("use_bidirectional_attention", False),
    ):
        if values[key] != only:
            raise ConfigError(f"{path}: {key} = {values[key]!r} is not supported, only {only!r}: choose another model")
    # Only the text-only class applies it; `attn_logit_softcapping` is stored but applied by none.
    softcap = text.get("final_logit_softcapping") if text is outer else None
    try:
        if (scalar := float(values["query_pre_attn_scalar"])) <= 0:
            raise ValueError(f"query_pre_attn_scalar {scalar} is not positive")
        return DecoderConfig(
            name=folder.resolve().name,
            architecture=_MODEL_TYPES[model_type],
            vocab_size=int(values["vocab_size"]),
            hidden_size=int(values["hidden_size"]),
            intermediate_size=int(values["intermediate_size"]),
            num_heads=int(values["num_attention_heads"]),
            num_kv_heads=int(values["num_key_value_heads"]),
            head_dim=int(values["head_dim"]),
            layer_kinds=_layer_kinds(path, text, int(values["num_hidden_layers"])),
            window=int(values["sliding_window"]),
            rope_local=_rope(path, text, "sliding_attention", "rope_local_base_freq", _THETA_LOCAL),
            rope_global=_rope(path, text, "full_attention", "rope_theta", _THETA_GLOBAL),
            attention_scale=scalar**-0.5,
            norm_eps=float(values["rms_norm_eps"]),
            context=int(values["max_position_embeddings"]),
            logit_softcap=None if softcap is None else float(softcap),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a value is missing or of the wrong type ({error}): fetch it again") from error


def write_config(config: DecoderConfig, folder: Path) -> None:
    """Write a `config.json` that `read_config` and transformers 5 (as Gemma3ForCausalLM) read alike."""
    scalar = config.attention_scale**-2
    data = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        # Their class accepts whole numbers only, and the square of a root is a hair off.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "sliding_window": config.window,
        "layer_types": [_LAYER_TYPES[kind] for kind in config.layer_kinds],
        "rope_parameters": {
            "sliding_attention": _rope_parameters(config.rope_local),
            "full_attention": _rope_parameters(config.rope_global),
        },
        "final_logit_softcapping": config.logit_softcap,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent}: no config.json: give the folder of a Hugging Face checkpoint or a .gguf file"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}): fetch it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a JSON object, got {type(data).__name__}: fetch it again")
    return data


def _layer_kinds(path: Path, text: dict[str, Any], num_layers: int) -> tuple[LayerKind, ...]:
    if (names := text.get("layer_types")) is None:
        pattern = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or _PATTERN)
        return tuple("local" if (index + 1) % pattern else "global" for index in range(num_layers))
    if unknown := sorted(set(names) - set(_LAYER_KINDS)):
        raise ConfigError(f"{path}: unknown layer_types {unknown}: known are {', '.join(_LAYER_KINDS)}")
    if len(names) != num_layers:
        raise ConfigError(f"{path}: {len(names)} layer_types for {num_layers} layers: they must be as many")
    return tuple(_LAYER_KINDS[name] for name in names)


def _rope(path: Path, text: dict[str, Any], layer_type: str, theta_key: str, default_theta: float) -> Rope:
    values = dict((text.get("rope_parameters") or {}).get(layer_type) or {})
    if layer_type == "full_attention":
        values |= text.get("rope_scaling") or {}
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ConfigError(f"{path}: {layer_type} has rope_type {rope_type!r}: only default and linear are supported")
    theta = values.get("rope_theta", text.get(theta_key))
    return Rope(
        theta=default_theta if theta is None else float(theta),
        factor=float(values["factor"]) if rope_type == "linear" else 1.0,
    )


def _rope_parameters(rope: Rope) -> dict[str, Any]:
    if rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
