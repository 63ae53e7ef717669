"""Mistral, and Ministral of 2024, as textbook tensor code, and all that is known of their files.

Source: arXiv 2310.06825 and transformers' `mistral` and `ministral`. Mistral's layers all have one window or none;
Ministral's have it by `layer_types`. llama.cpp stores both as `llama`, without windows, so such a file is read as
Llama's, whose numbers are the same as far as the window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transom.zoo import pre_norm
from transom.zoo.architecture import Architecture, HuggingFaceFormat, Preset
from transom.zoo.config import tile
from transom.zoo.config_keys import Keys
from transom.zoo.rope import Rope
from transom.zoo.rope_keys import rope_buffer
from transom.zoo.usual_keys import read_windows, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(pre_norm.PreNormConfig):
    """A decoder whose layers have a window, or some of them, or none."""

    architecture: str = "mistral"


class Mistral(pre_norm.PreNormDecoder):
    """The decoder."""


# Class defaults of MistralConfig and MinistralConfig, transformers 5.23.
_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    fields = pre_norm.read(text, _SIZES)
    if text.get("model_type") == "ministral" and text.get("layer_types") is not None:
        return {**fields, **read_windows(text, _SIZES, pattern=1)}
    window = None
    if text.values.get("sliding_window", _SIZES["sliding_window"]) is not None:
        window = text.whole("sliding_window", _SIZES["sliding_window"])
    return {**fields, **pre_norm.read_uniform(text, pre_norm.read_depth(text, _SIZES), window)}


def _write(config: MistralConfig) -> dict[str, Any]:
    if len(set(config.layer_kinds)) == 1:
        return {**pre_norm.write(config, "mistral", "MistralForCausalLM"), "sliding_window": config.layers[0].window}
    return {**pre_norm.write(config, "ministral", "MinistralForCausalLM"), **windows(config)}


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"mistral": None, "ministral": None},
    classes=("MistralForCausalLM", "MinistralForCausalLM"),
    sizes=_SIZES,
    supported=pre_norm.SUPPORTED,
    keys=pre_norm.KEYS,
    read=_read,
    write=_write,
    buffer=rope_buffer,
)


def _released(
    name: str, hub: str, num_layers: int, width: int, mlp: int, theta: float,
    *, context: int = 32_768, rows: int = 131_072, window: int | None = None,
) -> Preset:  # fmt: skip
    config = MistralConfig(
        name=name, layer_kinds=tile("G" if window is None else "L", num_layers), window=window, hidden_size=width,
        intermediate_size=mlp, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=rows, rope=Rope(theta=theta),
        tied=False, context=context, norm_eps=1e-5,
    )  # fmt: skip
    return Preset(config=config, hub=f"mistralai/{hub}")


_PRESETS = (
    Preset(
        config=MistralConfig(
            name="mistral-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("GLL", 3), window=16, rope=Rope(theta=1e4), tied=False, context=512,
        )
    ),
    _released("mistral-7b-v0.1", "Mistral-7B-Instruct-v0.1", 32, 4096, 14_336, 1e4, rows=32_000, window=4096),
    _released("mistral-7b-v0.3", "Mistral-7B-Instruct-v0.3", 32, 4096, 14_336, 1e6, rows=32_768),
    _released("mistral-nemo-12b", "Mistral-Nemo-Instruct-2407", 40, 5120, 14_336, 1e6, context=131_072),
    _released("mistral-small-24b", "Mistral-Small-24B-Instruct-2501", 40, 5120, 32_768, 1e8),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="mistral",
    config=MistralConfig,
    build=Mistral,
    huggingface=_HUGGINGFACE,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.7, "top_p": 1.0},
)
