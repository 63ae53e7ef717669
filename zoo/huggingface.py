"""Hugging Face's `config.json`, read and written without their library.

A config is read as transformers 5 reads it. A key that bears on numbers is understood, or refused by name where its
value is one that transformers itself refuses, reads in another way in its two generations, or that the zoo cannot
compute. Keys that nothing reads are listed by `left_out`. What a family's keys are stands in its model's file,
which reads those that families share by `usual_keys` and `rope_keys`; the keys that all of them have stand here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transom.errors import ConfigError
from transom.json_object import read_object
from transom.zoo.architecture import Architecture, HuggingFaceFormat
from transom.zoo.architectures import architecture, architectures
from transom.zoo.checkpoints.containers import explain_missing
from transom.zoo.config import DecoderConfig, read_decoder
from transom.zoo.config_keys import Keys, short

CONFIG = "config.json"

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
    if "auto_map" in keys.values and "auto_map" not in form.ignored:
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
