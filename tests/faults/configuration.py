"""Configurations that are a little wrong, each with the suite's cases that must notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from transom.zoo.gemma3 import Gemma3Config

Change = Callable[[Gemma3Config], Gemma3Config]


@dataclasses.dataclass(frozen=True)
class ConfigFault:
    """A wrong configuration.

    Attributes:
        change: Makes it from the right one.
        red: Every case of the suite that it must turn red.
    """

    change: Change
    red: tuple[str, ...]


def _as_the_first(config: Gemma3Config) -> Gemma3Config:
    """Every layer is taken to be as the first one."""
    return dataclasses.replace(config, layer_kinds=config.layer_kinds[:1] * config.num_layers)


def wrong_window(by: int) -> Change:
    """The window is longer than it should be by some keys."""
    return lambda config: dataclasses.replace(config, window=config.window + by)


def _period_of_two(config: Gemma3Config) -> Gemma3Config:
    """A pattern is guessed from the first global layer, and repeated."""
    period = config.layer_kinds[: config.layer_kinds.index("global") + 1]
    kinds = (period * config.num_layers)[: config.num_layers]
    return dataclasses.replace(config, layer_kinds=kinds)


def _round_window(config: Gemma3Config) -> Gemma3Config:
    """The window is rounded up to a multiple of 8."""
    return dataclasses.replace(config, window=-(-config.window // 8) * 8)


def _scale_of_width(config: Gemma3Config) -> Gemma3Config:
    """The score's factor is taken from the width of a head."""
    return dataclasses.replace(config, attention_scale=config.head_dim**-0.5)


def _no_rope_factor(config: Gemma3Config) -> Gemma3Config:
    """Position scaling is forgotten."""
    return dataclasses.replace(config, rope_global=dataclasses.replace(config.rope_global, factor=1.0))


def _rope_factor_everywhere(config: Gemma3Config) -> Gemma3Config:
    """Position scaling is applied to local layers too."""
    factor = config.rope_global.factor
    return dataclasses.replace(config, rope_local=dataclasses.replace(config.rope_local, factor=factor))


def _no_softcap(config: Gemma3Config) -> Gemma3Config:
    """The bound on the logits is forgotten."""
    return dataclasses.replace(config, logit_softcap=None)


CONFIG_FAULTS: Mapping[str, ConfigFault] = {
    "every layer as the first": ConfigFault(
        _as_the_first,
        ("two_periods", "one_global", "global_first", "odd_window", "window_one", "one_kv_head", "wide_heads",
         "rope_factor", "softcap", "image_past_window", "image_in_window"),
    ),
    "a guessed period": ConfigFault(_period_of_two, ("one_global", "global_first")),
    "window rounded up": ConfigFault(_round_window, ("odd_window", "window_one")),
    "scale of the head's width": ConfigFault(_scale_of_width, ("wide_heads",)),
    "no rope factor": ConfigFault(_no_rope_factor, ("rope_factor",)),
    "rope factor in local layers": ConfigFault(_rope_factor_everywhere, ("rope_factor",)),
    "no softcap": ConfigFault(_no_softcap, ("softcap",)),
}  # fmt: skip
