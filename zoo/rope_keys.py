"""Rotary embeddings in `config.json`, as both generations of transformers write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from transom.errors import ConfigError
from transom.zoo.config import LARGEST
from transom.zoo.config_keys import Keys, is_positive, short
from transom.zoo.rope import Llama3Rope, ProportionalRope, Rope, YarnRope, yarn_magnitude

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


def read_rope(text: Keys, theta: float, *, beside: Sequence[str] = ()) -> Rope:
    """The one rotary embedding of a decoder whose rotated layers share it.

    Args:
        text: Keys that describe the decoder.
        theta: Of configs that do not say.
        beside: As in `read_ropes`.

    Raises:
        ConfigError: As `read_ropes` does.
    """
    return read_ropes(text, {"": ("rope_theta", theta)}, "", beside=beside)[""]


def rope_buffer(config: Any, name: str) -> torch.Tensor | None:
    """What a buffer of this name must hold, float64, where layers share `config.rope`; None for a name that is none."""
    return config.rope.frequencies(config.head_dim, dtype=torch.float64) if "inv_freq" in name else None


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
