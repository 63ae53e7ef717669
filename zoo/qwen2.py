"""Qwen 2 and 2.5, as textbook tensor code, and all that is known of their files.

Source: the Qwen 2.5 report (arXiv 2412.15115) and transformers' `qwen2`. Queries, keys and values have biases; later
layers may have a window, which no released size uses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from transom.zoo import pre_norm
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.chat import CHATML
from transom.zoo.checkpoints.gguf_config import USUAL_NEUTRAL
from transom.zoo.config import tile
from transom.zoo.config_keys import Keys
from transom.zoo.rope import Rope
from transom.zoo.rope_keys import rope_buffer
from transom.zoo.usual_keys import LAYER_KINDS, read_layer_types, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(pre_norm.PreNormConfig):
    """A decoder whose later layers may be local."""

    architecture: str = "qwen2"


class Qwen2(pre_norm.PreNormDecoder):
    """The decoder."""

    attention = functools.partial(pre_norm.RotatedAttention, bias=True)


# Class defaults of Qwen2Config, transformers 5.23.
_SIZES = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
_WINDOW, _FULL_LAYERS = 4096, 28
WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
"""Keys that `read_layers` reads."""


def read_layers(text: Keys, depth: int) -> dict[str, Any]:
    """Kinds of layers and their window: none unless `use_sliding_window`, then from layer `max_window_layers` on.

    Raises:
        ConfigError: If a key has no such value, or a layer is local and there is no window.
    """
    window = None
    if text.flag("use_sliding_window", False) and text.values.get("sliding_window", _WINDOW) is not None:
        window = text.whole("sliding_window", _WINDOW)
    first = text.values.get("max_window_layers", _FULL_LAYERS)
    if type(first) is not int or first < 0:
        text.refuse("max_window_layers", "expected a whole number from 0 on")
    if text.get("layer_types") is None:
        kinds = tuple("global" if window is None or index < first else "local" for index in range(depth))
    else:
        kinds = tuple(LAYER_KINDS[name] for name in read_layer_types(text, count=depth, pattern=1))
    if "local" in kinds and window is None:
        text.refuse("layer_types", "layers of sliding_attention need use_sliding_window and a sliding_window")
    return {"layer_kinds": kinds, "window": window if "local" in kinds else None}


def write_layers(config: pre_norm.PreNormConfig) -> dict[str, Any]:
    """What `read_layers` reads."""
    return {"use_sliding_window": config.window is not None, **windows(config)}


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    return {**pre_norm.read(text, _SIZES), **read_layers(text, pre_norm.read_depth(text, _SIZES))}


def _write(config: Qwen2Config) -> dict[str, Any]:
    return {**pre_norm.write(config, "qwen2", "Qwen2ForCausalLM"), **write_layers(config)}


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"qwen2": None},
    classes=("Qwen2ForCausalLM",),
    sizes=_SIZES,
    # Queries, keys and values have biases, whatever the key says.
    supported={**pre_norm.SUPPORTED, "attention_bias": (True, False)},
    keys=pre_norm.KEYS | WINDOW_KEYS,
    read=_read,
    write=_write,
    buffer=rope_buffer,
)

_GGUF = GGUFFormat(
    name="qwen2",
    neutral=USUAL_NEUTRAL,
    read=pre_norm.read_gguf,
    tensors=pre_norm.GGUF_TENSORS,
    rows=pre_norm.as_stored,
)


def _released(
    size: str, num_layers: int, width: int, mlp: int, heads: int, kv_heads: int, *, rows: int = 152_064
) -> Preset:
    config = Qwen2Config(
        name=f"qwen2.5-{size.lower()}", layer_kinds=tile("G", num_layers), hidden_size=width, intermediate_size=mlp,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=width // heads, vocab_size=rows, rope=Rope(theta=1e6),
        tied=rows == 151_936, context=32_768,
    )  # fmt: skip
    return Preset(config=config, hub=f"Qwen/Qwen2.5-{size}-Instruct")


_PRESETS = (
    # Global layers first, local ones after them, as the released configurations would have it.
    Preset(
        config=Qwen2Config(
            name="qwen2-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=16, layer_kinds=("global", "local", "local"), window=16, rope=Rope(theta=1e4), tied=True,
            context=512,
        )
    ),
    _released("0.5B", 24, 896, 4864, 14, 2, rows=151_936),
    _released("1.5B", 28, 1536, 8960, 12, 2, rows=151_936),
    _released("3B", 36, 2048, 11_008, 16, 2, rows=151_936),
    _released("7B", 28, 3584, 18_944, 28, 4),
    _released("14B", 48, 5120, 13_824, 40, 8),
    _released("32B", 64, 5120, 27_648, 40, 8),
    _released("72B", 80, 8192, 29_568, 64, 8),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="qwen2",
    config=Qwen2Config,
    build=Qwen2,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    chat=CHATML,
)
