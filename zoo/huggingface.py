"""Hugging Face's `config.json`, read and written without their library.

A config is read as transformers 5 reads it. A key that bears on numbers is understood, or refused by name where its
value is one that transformers itself refuses, reads in another way in its two generations, or that the zoo cannot
compute. Keys that nothing reads are listed by `left_out`. What a family's keys are stands in its model's file; the
keys that all families share stand here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transom.errors import ConfigError
from transom.json_object import read_object
from transom.zoo.architecture import Architecture, HuggingFaceFormat
from transom.zoo.architectures import architecture, architectures
from transom.zoo.checkpoints.containers import explain_missing
from transom.zoo.config import LARGEST, DecoderConfig, LayerKind, LocalGlobalConfig, read_decoder
from transom.zoo.config_keys import Keys, is_positive, short
from transom.zoo.rope import Llama3Rope, ProportionalRope, Rope, YarnRope, yarn_magnitude

CONFIG = "config.json"

LAYER_KINDS: dict[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}
LAYER_TYPES = {kind: name for name, kind in LAYER_KINDS.items()}

# Keys with one value that model files compute; absent is that value too. None stands in the list where transformers
# takes null for it.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    # Here transformers takes null for false.
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    # transformers 5 takes it for that of rope_parameters.
    "original_max_position_embeddings": (None,),
}
# What other tools write into a config whose tensors they packed.
_PACKED = ("quantization_config", "compression_config", "quantization")
_IGNORED = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "cache_implementation",
    "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path",
    "name_or_path", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "id2label",
    "label2id", "num_labels", "problem_type", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset",
}  # fmt: skip


def read_config(folder: Path, *, images: bool = False) -> DecoderConfig:
    """Read the text decoder of a checkpoint folder's `config.json`; the name is the folder's.

    Args:
        folder: Of the checkpoint.
        images: Whether the encoder of images is wanted too, if there is one.

    Raises:
        ConfigError: If the file is missing or corrupt, or describes a model that the zoo does not hold.
    """
    family, outer, text = _open(folder, images=images)
    for keys in dict.fromkeys((outer, text)):
        _refuse_packed(keys, family.huggingface)
        _refuse_unsupported(keys, family.huggingface)
    fields = family.huggingface.read(text, outer)
    return read_decoder(text.path, family.config, name=folder.resolve().name, architecture=family.name, **fields)


def left_out(folder: Path, *, images: bool = False) -> tuple[str, ...]:
    """What stands in a folder's `config.json` and is not applied, in plain words.

    Args:
        folder: Of the checkpoint.
        images: As `read_config` takes it.

    Raises:
        ConfigError: If the file cannot be read.
    """
    family, outer, text = _open(folder, images=images)
    form = family.huggingface
    not_applied = [*form.not_applied, *([] if text is outer else form.not_applied_inside)]
    lines = [
        f"{text.path.name}: {text.label(key)} = {short(value)} is not applied, as in transformers"
        for key in not_applied
        if (value := text.get(key)) is not None
    ]
    known = {
        *_IGNORED, *_SUPPORTED, *_PACKED, *form.ignored, *form.supported, *form.sizes, *form.keys, *form.not_applied,
        *form.not_applied_inside, *(key for key in form.model_types.values() if key is not None),
    }  # fmt: skip
    unknown = [
        keys.label(key) for keys in dict.fromkeys((outer, text)) for key in sorted(keys.values) if key not in known
    ]
    if unknown:
        lines.append(f"{text.path.name}: nothing reads the keys {', '.join(unknown)}")
    return tuple(lines)


def write_config(config: DecoderConfig, folder: Path) -> None:
    """Write a `config.json` that `read_config` and transformers 5 read alike."""
    data = architecture(config.architecture).huggingface.write(config)
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_sizes(text: Keys, fields: Mapping[str, str], defaults: Mapping[str, int]) -> dict[str, int]:
    """Sizes of a config.

    Args:
        text: Keys that describe the decoder.
        fields: Our name of a size -> the key.
        defaults: What an absent key means.

    Raises:
        ConfigError: If a value is no whole number from 1 on, or transformers refuses them together.
    """
    sizes = {field: text.whole(key, defaults[key]) for field, key in fields.items()}
    # transformers refuses it too, though nothing in a model need divide so.
    if sizes["hidden_size"] % sizes["num_heads"]:
        text.refuse("hidden_size", f"expected a multiple of num_attention_heads, {sizes['num_heads']}")
    return sizes


_USUAL = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "context": "max_position_embeddings",
}
SIZES = {**_USUAL, "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
"""Our names of sizes -> keys, where a class has a default for each."""


def read_usual_sizes(text: Keys, defaults: Mapping[str, int]) -> dict[str, int]:
    """Sizes by the keys that most families share; heads of keys and values, and their width, follow from others.

    Args:
        text: Keys that describe the decoder.
        defaults: What an absent key means. Without `num_key_value_heads`, there are as many as query heads; without
            `head_dim`, they share the model's width.

    Raises:
        ConfigError: As `read_sizes` does.
    """
    sizes = read_sizes(text, _USUAL, defaults)
    heads, per_head = sizes["num_heads"], sizes["hidden_size"] // sizes["num_heads"]
    absent = {
        "num_key_value_heads": defaults.get("num_key_value_heads", heads),
        "head_dim": defaults.get("head_dim", per_head),
    }
    for field, key, null in (("num_kv_heads", "num_key_value_heads", heads), ("head_dim", "head_dim", per_head)):
        stated = key in text.values
        sizes[field] = null if stated and text.get(key) is None else text.whole(key, absent[key])
    return sizes


def usual_sizes(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_usual_sizes` reads, number of layers and activation, and no tokens that begin or end a text.

    Those stand in the tokenizer's files and in generation_config.json.
    """
    return {
        **{key: getattr(config, field) for field, key in _USUAL.items()},
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def read_windows(text: Keys, defaults: Mapping[str, int], pattern: int) -> dict[str, Any]:
    """`layer_kinds` and `window` of a `LocalGlobalConfig`.

    Args:
        text: Keys that describe the decoder.
        defaults: What an absent `num_hidden_layers` or `sliding_window` means; the latter may be left out for none.
        pattern: Every n-th layer is global, where the config does not say.

    Raises:
        ConfigError: If the keys contradict each other, or a type of layer is unknown.
    """
    layer_types = read_layer_types(text, count=defaults["num_hidden_layers"], pattern=pattern)
    window = text.values.get("sliding_window", defaults.get("sliding_window"))
    if window is not None:
        window = text.whole("sliding_window", window)
    elif "sliding_attention" in layer_types:
        text.refuse("sliding_window", "layers of sliding_attention need one: set it, or make them full_attention")
    return {"layer_kinds": tuple(LAYER_KINDS[name] for name in layer_types), "window": window}


def windows(config: LocalGlobalConfig) -> dict[str, Any]:
    """The keys that `read_windows` reads."""
    return {
        "sliding_window": config.window,
        "layer_types": [LAYER_TYPES[kind] for kind in config.layer_kinds],
    }


def read_layer_types(text: Keys, *, count: int, pattern: int) -> list[str]:
    """The type of every layer: `layer_types`, or every n-th is full.

    Args:
        text: Keys that describe the decoder.
        count: Layers, where the config does not say.
        pattern: n, where the config does not say.

    Raises:
        ConfigError: If the keys contradict each other, or a type is unknown.
    """
    count = text.whole("num_hidden_layers", count, LARGEST["num_layers"])
    if (names := text.get("layer_types")) is None:
        pattern = text.values.get("sliding_window_pattern", pattern)
        if type(pattern) is not int or pattern < 1:
            text.refuse("sliding_window_pattern", "expected a positive whole number")
        # transformers 5 writes it beside layer_types, and does not read it.
        if text.values.get("_sliding_window_pattern", pattern) != pattern:
            text.refuse("_sliding_window_pattern", f"without layer_types, transformers reads a pattern of {pattern}")
        return ["full_attention" if index % pattern == pattern - 1 else "sliding_attention" for index in range(count)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        text.refuse("layer_types", f"expected a list of {' and '.join(LAYER_KINDS)}")
    if unknown := sorted(set(names) - set(LAYER_KINDS)):
        raise ConfigError(f"{text.path}: unknown layer_types {unknown}: known are {', '.join(LAYER_KINDS)}")
    if len(names) != count:
        raise ConfigError(f"{text.path}: {len(names)} layer_types for {count} layers: they must be as many")
    return list(names)


_PLAIN_ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
_ROPE_KEYS = {
    "default": _PLAIN_ROPE_KEYS,
    "linear": _PLAIN_ROPE_KEYS,
    "llama3": (*_PLAIN_ROPE_KEYS, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *_PLAIN_ROPE_KEYS, "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim",
    ),
    "proportional": ("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"),
}  # fmt: skip
"""Kind of rotary embedding -> the keys that it has a use for, or that transformers passes over."""


def read_ropes(
    text: Keys, thetas: Mapping[str, tuple[str, float]], scaled: str, *, beside: Sequence[str] = ()
) -> dict[str, Rope]:
    """The rotary embedding of each type of layer, from the keys of both generations, which must agree.

    Up to transformers 4 a config holds a theta a type and `rope_scaling`; from 5 on `rope_parameters`, by type where
    there are several.

    Args:
        text: Keys that describe the decoder.
        thetas: Type of layer -> the older key of its theta, and the theta of configs that do not say. One type of ""
            stands for all layers, whose parameters are not nested.
        scaled: The type that `rope_scaling` is about.
        beside: Keys that stand among the parameters and that the family reads itself.

    Raises:
        ConfigError: If they contradict each other or are not supported.
    """
    known = tuple(dict.fromkeys((*(key for keys in _ROPE_KEYS.values() for key in keys), *beside)))
    parameters, scaling = text.mapping("rope_parameters"), text.mapping("rope_scaling")
    for key, entries, names in (
        ("rope_parameters", parameters, known if "" in thetas else tuple(thetas)),
        ("rope_scaling", scaling, known),
    ):
        if others := sorted(name for name, value in entries.items() if name not in names and value is not None):
            text.refuse(key, f"{', '.join(others)} is not understood there, only {', '.join(names)}")
    # transformers 4 takes `type` for `rope_type`; 5 overlooks it where parameters stand by type of layer.
    if "" not in thetas and scaling.get("type") is not None and scaling.get("rope_type") is None:
        text.refuse("rope_scaling", "call its type rope_type: versions of transformers read type differently")
    ropes = {}
    for layer_type, (theta_key, theta) in thetas.items():
        entry = (parameters.get(layer_type) if layer_type else parameters) or {}
        if not isinstance(entry, dict):
            text.refuse("rope_parameters", f"expected an object for {layer_type}")
        older = {} if theta_key not in text.values else {"rope_theta": text.values[theta_key]}
        if layer_type == scaled:
            older |= scaling
        ropes[layer_type] = _rope(text, layer_type, theta, entry, older, beside)
    return ropes


def _rope(
    text: Keys, layer_type: str, theta: float, entry: dict[str, Any], older: dict[str, Any], beside: Sequence[str]
) -> Rope:
    def refuse(reason: str) -> NoReturn:
        raise ConfigError(f"{text.path}: {text.prefix}{layer_type or 'rope_parameters'}: {reason}")

    def number(key: str, default: float | None = None) -> float:
        """A number; the default, if there is one, where the key is absent or null."""
        value: Any = values.get(key)
        if value is None and default is not None:
            return default
        if not is_positive(value):
            what = "the factor of its rotary embedding" if key == "factor" else key
            refuse(f"{what} is {short(value)}, expected a positive finite number")
        return float(value)

    for key, value in older.items():
        if key in entry and entry[key] != value and not (key == "rope_theta" and value is None):
            refuse(f"{key} is {short(entry[key])} in rope_parameters and {short(value)} beside it: they must agree")
    values: dict[str, Any] = {"rope_theta": theta, **older, **entry}
    names = {values[key] for key in ("rope_type", "type") if isinstance(values.get(key), str)}
    if len(names) > 1 or any(not isinstance(values.get(key, ""), str | None) for key in ("rope_type", "type")):
        refuse(f"rope_type {short(values.get('rope_type'))} and type {short(values.get('type'))} must be one name")
    rope_type = names.pop() if names else "default"
    known = (*_ROPE_KEYS.get(rope_type, _PLAIN_ROPE_KEYS), *beside)
    if others := sorted(name for name, value in values.items() if name not in known and value is not None):
        refuse(f"{', '.join(others)} of its rotary embedding is not understood, only {', '.join(known)}")
    if rope_type not in _ROPE_KEYS:
        refuse(f"rope_type {rope_type!r} is not supported, only {', '.join(_ROPE_KEYS)} are")
    if rope_type == "proportional":
        if (fraction := number("partial_rotary_factor", 1.0)) > 1:
            refuse(f"partial_rotary_factor is {fraction:g}, expected at most 1")
        return ProportionalRope(theta=number("rope_theta"), factor=number("factor", 1.0), fraction=fraction)
    if rope_type == "default":
        if (factor := values.get("factor")) not in (None, 1):
            refuse(f"its rotary embedding has the factor {short(factor)} and no rope_type that uses it, such as linear")
        values["factor"] = 1
    plain = {"theta": number("rope_theta"), "factor": number("factor")}
    if rope_type in ("default", "linear"):
        return Rope(**plain)
    # Without it, transformers takes the context itself for the one before it was extended.
    original = values.get("original_max_position_embeddings", text.get("max_position_embeddings"))
    if type(original) is not int or not 1 <= original <= LARGEST["context"]:
        refuse(f"original_max_position_embeddings is {short(original)}, expected a whole number from 1 on")
    if rope_type == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            refuse(f"low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
        return Llama3Rope(**plain, low_freq_factor=low, high_freq_factor=high, original_context=original)
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        refuse(f"truncate is {short(truncate)}, expected true or false")
    if layer_type and not truncate:
        refuse("truncate is false, which transformers overlooks where parameters stand by type of layer")
    slow, fast = number("beta_slow", 1.0), number("beta_fast", 32.0)
    if slow >= fast:
        refuse(f"beta_slow {slow:g} must be less than beta_fast {fast:g}")
    if plain["theta"] <= 1:
        refuse(f"rope_theta is {plain['theta']:g}, expected more than 1, as pairs slow down with their index")
    attention_factor = None
    if values.get("attention_factor") is not None:
        attention_factor = number("attention_factor")
    elif values.get("mscale") and values.get("mscale_all_dim"):
        weights = number("mscale"), number("mscale_all_dim")
        above, below = (yarn_magnitude(plain["factor"], weight) for weight in weights)
        attention_factor = above / below
    return YarnRope(
        **plain,
        original_context=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        attention_factor=attention_factor,
    )


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """What `rope_parameters` holds of a rotary embedding."""
    plain = {"rope_theta": rope.theta, "factor": rope.factor}
    match rope:
        case Llama3Rope():
            return {
                "rope_type": "llama3",
                **plain,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_context,
            }
        case YarnRope():
            return {
                "rope_type": "yarn",
                **plain,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
                "original_max_position_embeddings": rope.original_context,
                **({} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}),
            }
        case ProportionalRope():
            return {"rope_type": "proportional", **plain, "partial_rotary_factor": rope.fraction}
    if rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", **plain}


def _refuse_packed(keys: Keys, form: HuggingFaceFormat) -> None:
    for key in _PACKED:
        if (value := keys.get(key)) is None:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else None
        if method in form.packed:
            continue
        by = f" by {method}" if isinstance(method, str) else ""
        raise ConfigError(
            f"{keys.path}: {keys.label(key)} says that the weights are packed{by}: give the checkpoint that is not "
            "quantised, or one whose weights were dequantised and whose config has that key no more"
        )


def _refuse_unsupported(keys: Keys, form: HuggingFaceFormat) -> None:
    if "auto_map" in keys.values:
        keys.refuse("auto_map", "the checkpoint brings model code of its own, which is not supported")
    for key, allowed in {**_SUPPORTED, **form.supported}.items():
        if key in keys.values and key not in form.keys and not any(_same(keys.values[key], value) for value in allowed):
            keys.refuse(key, f"only {json.dumps(allowed[0])} is supported: choose another model")


def _open(folder: Path, *, images: bool) -> tuple[Architecture, Keys, Keys]:
    """The family, the whole config, and its text part: the same object where the config is of text only."""
    path = folder / CONFIG
    if (values := read_object(path)) is None:
        raise ConfigError(explain_missing(folder, CONFIG))
    outer = Keys(path, values)
    model_type = outer.get("model_type")
    texts = [family for family in architectures() if family.text is None]
    families = {kind: family for family in texts for kind in family.huggingface.model_types}
    if not isinstance(model_type, str) or model_type not in families:
        raise ConfigError(f"{path}: unknown model_type {short(model_type)}: known are {', '.join(families)}")
    family = families[model_type]
    form = family.huggingface
    if images and form.model_types[model_type] is not None and outer.get("vision_config") is not None:
        seeing = [other for other in architectures() if other.text == family.name]
        family = seeing[0] if seeing else family
        form = family.huggingface
    if (classes := outer.get("architectures")) is not None:
        if not isinstance(classes, list) or any(name not in form.classes for name in classes):
            outer.refuse("architectures", f"expected a language model, one of {', '.join(form.classes)}")
    inner_key = form.model_types[model_type]
    plain = [name for name, key in form.model_types.items() if key is None]
    if inner_key is None:
        for key in form.model_types.values():
            if key is not None and outer.get(key) is not None:
                outer.refuse(key, f"a {model_type} is the language model itself: keep one of the two")
        return family, outer, outer
    inner = outer.get(inner_key)
    if not isinstance(inner, dict) or not inner.keys() & form.sizes.keys():
        reason = "is missing" if inner_key not in outer.values else f"is {short(inner)}"
        raise ConfigError(
            f"{path}: {inner_key} {reason}, which describes the language model of a {model_type!r}: mend it, or set "
            f"model_type to {plain[0]!r} if the keys beside it are those of the language model"
        )
    text = Keys(path, inner, f"{inner_key}.")
    if text.values.get("model_type", plain[0]) not in plain:
        text.refuse("model_type", f"expected {' or '.join(map(repr, plain))}")
    for key in sorted({*form.sizes, *form.keys}):
        value = text.values.get(key, form.sizes.get(key))
        if key in outer.values and outer.values[key] != value:
            outer.refuse(key, f"beside {inner_key}, which says {short(value)}: they must agree")
    return family, outer, text


def _same(value: Any, allowed: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)
