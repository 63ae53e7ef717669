"""Keys of `config.json` that most families share, read and written: sizes, windows, types of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.errors import ConfigError
from transom.zoo.config import LARGEST, DecoderConfig, LayerKind, LocalGlobalConfig
from transom.zoo.config_keys import Keys

LAYER_KINDS: dict[str, LayerKind] = {"sliding_attention": "local", "full_attention": "global"}
LAYER_TYPES = {kind: name for name, kind in LAYER_KINDS.items()}


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
