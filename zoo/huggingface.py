"""Hugging Face's `config.json`, read and written without their library.

Two generations exist. Up to transformers 4 a config holds `rope_theta`, `rope_local_base_freq`, `rope_scaling` and
`sliding_window_pattern`; from 5 on `rope_parameters` and `layer_types`, each per kind of layer. Early Gemma 3 configs
are sparse: whatever equals the class default is left out, so the defaults below are part of the format.

A config is read as transformers 5 reads it. A key that bears on numbers is understood, or refused by name where its
value is one that transformers itself refuses, reads in another way in its two generations, or that the zoo cannot
compute. Keys that nothing reads are listed by `left_out`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from transom.errors import ConfigError
from transom.json_object import read_object
from transom.zoo.checkpoints.containers import explain_missing
from transom.zoo.config import LARGEST, DecoderConfig, LayerKind, Rope, read_decoder
from transom.zoo.config_keys import Keys, is_positive, short

CONFIG = "config.json"

_MODEL_TYPES = {"gemma3_text": "gemma3", "gemma3": "gemma3"}
_LAYER_KINDS: dict[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}
_LAYER_TYPES = {kind: name for name, kind in _LAYER_KINDS.items()}
# A bare trunk is a language model too, as the head is tied to the table.
_ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextModel", "Gemma3Model")

# Class defaults of Gemma3TextConfig, transformers 5.23.
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
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
}
"""Our name of a size -> the key."""

_EPS, _SCALAR, _PATTERN = 1e-6, 256, 6
_THETAS = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
_ACTIVATION = "gelu_pytorch_tanh"

# Keys with one value that the model file computes; absent is that value too. None stands in the list where
# transformers takes null for it.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": (_ACTIVATION,),
    "hidden_act": (_ACTIVATION, None),
    "tie_word_embeddings": (True,),
    "attention_bias": (False,),
    "mlp_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    # Here transformers takes null for false.
    "is_causal": (True,),
    "use_sliding_window": (True, None),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None, {}),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
# What other tools write into a config whose tensors they packed.
_PACKED = ("quantization_config", "compression_config", "quantization")
# Keys that transformers' class stores and never applies.
_NOT_APPLIED = ("attn_logit_softcapping",)
_WITHOUT_NUMBERS = {
    "architectures", "model_type", "text_config", "vision_config", "transformers_version", "dtype", "torch_dtype",
    "use_cache", "cache_implementation", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id",
    "pad_token_id", "_name_or_path", "name_or_path", "return_dict", "output_hidden_states", "output_attentions",
    "chunk_size_feed_forward", "id2label", "label2id", "num_labels", "problem_type", "_attn_implementation",
    "attn_implementation", "_attn_implementation_autoset", "mm_tokens_per_image", "boi_token_index",
    "eoi_token_index", "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id", "_sliding_window_pattern",
}  # fmt: skip


def read_config(folder: Path) -> DecoderConfig:
    """Read the text decoder of a checkpoint folder's `config.json`; the name is the folder's.

    Raises:
        ConfigError: If the file is missing or corrupt, or describes a model that the zoo does not hold.
    """
    outer, text = _open(folder)
    for keys in dict.fromkeys((outer, text)):
        _refuse_packed(keys)
        _refuse_unsupported(keys)
    layer_types = _layer_types(text)
    local = "sliding_attention" in layer_types
    if local and text.values.get("sliding_window", "") is None:
        text.refuse("sliding_window", "layers of sliding_attention need one: set it, or make them full_attention")
    window = _SIZES["sliding_window"]
    if text.values.get("sliding_window", window) is not None:
        window = text.whole("sliding_window", window)
    scalar = text.number("query_pre_attn_scalar", _SCALAR)
    sizes = {field: text.whole(key, _SIZES[key]) for field, key in _FIELDS.items()}
    # transformers refuses it too, though nothing in the model divides so.
    if sizes["hidden_size"] % sizes["num_heads"]:
        text.refuse("hidden_size", f"expected a multiple of num_attention_heads, {sizes['num_heads']}")
    ropes = _ropes(text)
    for key in _NOT_APPLIED:
        if text.get(key) is not None:
            text.number(key, 0)
    softcap = None
    # Only the text-only class applies it.
    if text is outer and text.get("final_logit_softcapping") is not None:
        softcap = text.number("final_logit_softcapping", 0)
    return read_decoder(
        text.path,
        name=folder.resolve().name,
        architecture=_MODEL_TYPES[outer.values["model_type"]],
        **sizes,
        layer_kinds=tuple(_LAYER_KINDS[name] for name in layer_types),
        window=window,
        rope_local=ropes["sliding_attention"],
        rope_global=ropes["full_attention"],
        attention_scale=scalar**-0.5,
        norm_eps=text.number("rms_norm_eps", _EPS),
        logit_softcap=softcap,
    )


def left_out(folder: Path) -> tuple[str, ...]:
    """What stands in a folder's `config.json` and is not applied, in plain words.

    Raises:
        ConfigError: If the file cannot be read.
    """
    outer, text = _open(folder)
    not_applied = [*_NOT_APPLIED, *([] if text is outer else ["final_logit_softcapping"])]
    lines = [
        f"{text.path.name}: {text.label(key)} = {short(value)} is not applied, as in transformers"
        for key in not_applied
        if (value := text.get(key)) is not None
    ]
    known = {*_WITHOUT_NUMBERS, *_READ, *_SUPPORTED, *_PACKED, *_NOT_APPLIED, "final_logit_softcapping"}
    unknown = [
        keys.label(key) for keys in dict.fromkeys((outer, text)) for key in sorted(keys.values) if key not in known
    ]
    if unknown:
        lines.append(f"{text.path.name}: nothing reads the keys {', '.join(unknown)}")
    return tuple(lines)


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
        "hidden_activation": _ACTIVATION,
        "tie_word_embeddings": True,
        # What ends a text stands in generation_config.json.
        "pad_token_id": 0,
        "bos_token_id": 2,
    }
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


_READ = {
    *_SIZES, "query_pre_attn_scalar", "rms_norm_eps", "layer_types", "sliding_window_pattern", "rope_parameters",
    "rope_scaling", *(key for key, _ in _THETAS.values()),
}  # fmt: skip


def _refuse_packed(keys: Keys) -> None:
    for key in _PACKED:
        if (value := keys.get(key)) is None:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else None
        by = f" by {method}" if isinstance(method, str) else ""
        raise ConfigError(
            f"{keys.path}: {keys.label(key)} says that the weights are packed{by}: give the checkpoint that is not "
            "quantised, or one whose weights were dequantised and whose config has that key no more"
        )


def _refuse_unsupported(keys: Keys) -> None:
    if "auto_map" in keys.values:
        keys.refuse("auto_map", "the checkpoint brings model code of its own, which is not supported")
    for key, allowed in _SUPPORTED.items():
        if key in keys.values and not any(_same(keys.values[key], value) for value in allowed):
            keys.refuse(key, f"only {json.dumps(allowed[0])} is supported: choose another model")


def _open(folder: Path) -> tuple[Keys, Keys]:
    """The whole config, and its text part: the same object where the config is of text only."""
    path = folder / CONFIG
    if (values := read_object(path)) is None:
        raise ConfigError(explain_missing(folder, CONFIG))
    outer = Keys(path, values)
    model_type = outer.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise ConfigError(f"{path}: unknown model_type {short(model_type)}: known are {', '.join(_MODEL_TYPES)}")
    if (architectures := outer.get("architectures")) is not None:
        if not isinstance(architectures, list) or any(name not in _ARCHITECTURES for name in architectures):
            outer.refuse("architectures", f"expected a language model, one of {', '.join(_ARCHITECTURES)}")
    if model_type == "gemma3_text":
        if outer.get("text_config") is not None:
            outer.refuse("text_config", "a gemma3_text is the language model itself: keep one of the two")
        return outer, outer
    inner = outer.get("text_config")
    if not isinstance(inner, dict) or not inner.keys() & _SIZES.keys():
        reason = "is missing" if "text_config" not in outer.values else f"is {short(inner)}"
        raise ConfigError(
            f"{path}: text_config {reason}, which describes the language model of a {model_type!r}: mend it, or set "
            "model_type to 'gemma3_text' if the keys beside it are those of the language model"
        )
    text = Keys(path, inner, "text_config.")
    if text.values.get("model_type", "gemma3_text") != "gemma3_text":
        text.refuse("model_type", "expected 'gemma3_text'")
    for key in sorted(_READ):
        value = text.values.get(key, _SIZES.get(key))
        if key in outer.values and outer.values[key] != value:
            outer.refuse(key, f"beside text_config, which says {short(value)}: they must agree")
    return outer, text


def _layer_types(text: Keys) -> list[str]:
    count = text.whole("num_hidden_layers", _SIZES["num_hidden_layers"], LARGEST["num_layers"])
    if (names := text.get("layer_types")) is None:
        pattern = text.values.get("sliding_window_pattern", _PATTERN)
        if type(pattern) is not int or pattern < 1:
            text.refuse("sliding_window_pattern", "expected a positive whole number")
        # transformers 5 writes it beside layer_types, and does not read it.
        if text.values.get("_sliding_window_pattern", pattern) != pattern:
            text.refuse("_sliding_window_pattern", f"without layer_types, transformers reads a pattern of {pattern}")
        return ["full_attention" if index % pattern == pattern - 1 else "sliding_attention" for index in range(count)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        text.refuse("layer_types", f"expected a list of {' and '.join(_LAYER_KINDS)}")
    if unknown := sorted(set(names) - set(_LAYER_KINDS)):
        raise ConfigError(f"{text.path}: unknown layer_types {unknown}: known are {', '.join(_LAYER_KINDS)}")
    if len(names) != count:
        raise ConfigError(f"{text.path}: {len(names)} layer_types for {count} layers: they must be as many")
    return list(names)


def _ropes(text: Keys) -> dict[str, Rope]:
    """The rotary embedding of each kind of layer, from the keys of both generations, which must agree."""
    parameters, scaling = text.mapping("rope_parameters"), text.mapping("rope_scaling")
    for key, entries, known in (("rope_parameters", parameters, _THETAS), ("rope_scaling", scaling, _ROPE_KEYS)):
        if others := sorted(name for name, value in entries.items() if name not in known and value is not None):
            text.refuse(key, f"{', '.join(others)} is not understood there, only {', '.join(known)}")
    # transformers 4 takes `type` for `rope_type`; 5 overlooks it.
    if scaling.get("type") is not None and scaling.get("rope_type") is None:
        text.refuse("rope_scaling", "call its type rope_type: versions of transformers read type differently")
    ropes = {}
    for layer_type, (theta_key, theta) in _THETAS.items():
        entry = parameters.get(layer_type) or {}
        if not isinstance(entry, dict):
            text.refuse("rope_parameters", f"expected an object for {layer_type}")
        older = {} if theta_key not in text.values else {"rope_theta": text.values[theta_key]}
        if layer_type == "full_attention":
            older |= scaling
        ropes[layer_type] = _rope(text, layer_type, theta, entry, older)
    return ropes


_ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")


def _rope(text: Keys, layer_type: str, theta: float, entry: dict[str, Any], older: dict[str, Any]) -> Rope:
    def refuse(reason: str) -> NoReturn:
        raise ConfigError(f"{text.path}: {text.prefix}{layer_type}: {reason}")

    for key, value in older.items():
        if key in entry and entry[key] != value and not (key == "rope_theta" and value is None):
            refuse(f"{key} is {short(entry[key])} in rope_parameters and {short(value)} beside it: they must agree")
    values = {"rope_theta": theta, **older, **entry}
    if others := sorted(name for name, value in values.items() if name not in _ROPE_KEYS and value is not None):
        refuse(f"{', '.join(others)} of its rotary embedding is not understood, only {', '.join(_ROPE_KEYS)}")
    names = {values[key] for key in ("rope_type", "type") if isinstance(values.get(key), str)}
    if len(names) > 1 or any(not isinstance(values.get(key, ""), str | None) for key in ("rope_type", "type")):
        refuse(f"rope_type {short(values.get('rope_type'))} and type {short(values.get('type'))} must be one name")
    rope_type = names.pop() if names else "default"
    if rope_type not in ("default", "linear"):
        refuse(f"rope_type {rope_type!r} is not supported, only default and linear are")
    factor: Any = values.get("factor")
    if rope_type == "default":
        if factor not in (None, 1):
            refuse(f"its rotary embedding has the factor {short(factor)} and no rope_type that uses it, such as linear")
        factor = 1
    if not is_positive(factor):
        refuse(f"the factor of its rotary embedding is {short(factor)}, expected a positive finite number")
    if not is_positive(values["rope_theta"]):
        refuse(f"rope_theta is {short(values['rope_theta'])}, expected a positive finite number")
    return Rope(theta=float(values["rope_theta"]), factor=float(factor))


def _rope_parameters(rope: Rope) -> dict[str, Any]:
    if rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}


def _same(value: Any, allowed: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)
