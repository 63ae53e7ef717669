"""Llama's decoder with a window of its own for every layer, such as `transom learn-windows` finds; a family of ours.

No other library reads its checkpoints. Names of tensors are Llama's, so that its weights serve either family: where all
layers are global, the two are one model.

Axes: see `pre_norm`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transom.errors import ConfigError
from transom.zoo import pre_norm
from transom.zoo.architecture import Architecture, HuggingFaceFormat, Preset
from transom.zoo.config import AttentionLayer, DecoderConfig
from transom.zoo.config_keys import Keys
from transom.zoo.rope import Rope
from transom.zoo.rope_keys import rope_buffer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveConfig(DecoderConfig):
    """A decoder whose layers are alike but for their windows, which are each layer's own.

    Attributes:
        windows: Keys that each layer sees, the query's own included; None for a global layer.
        rope: Rotary embedding.
        tied: Whether the head is the table of tokens.

    Raises:
        ConfigError: If a window is no positive whole number, beside what every configuration raises.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps")
    SCALED = ("rope",)

    architecture: str = "adaptive"
    windows: tuple[int | None, ...]
    rope: Rope
    tied: bool

    def __post_init__(self) -> None:
        for window in self.windows:
            if window is not None and (type(window) is not int or window < 1):
                raise ConfigError(f"{self.name}: a window of {window!r}, expected a positive whole number, or None")
        super().__post_init__()

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """What every layer keeps, first to last."""
        K, H = self.num_kv_heads, self.head_dim
        return tuple(AttentionLayer(kv_heads=K, key_width=H, value_width=H, window=window) for window in self.windows)


class Adaptive(pre_norm.PreNormDecoder):
    """The decoder."""


def with_windows(config: Any, windows: tuple[int | None, ...]) -> AdaptiveConfig:
    """A configuration of Llama, or of this family, with a window for each of its layers."""
    shared = {field.name for field in dataclasses.fields(AdaptiveConfig)} - {"architecture", "windows"}
    return AdaptiveConfig(**{name: getattr(config, name) for name in shared}, windows=windows)


_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    depth = pre_norm.read_depth(text, _SIZES)
    windows = text.get("layer_windows")
    if not isinstance(windows, list) or len(windows) != depth:
        text.refuse("layer_windows", f"expected a window, or null for a global layer, for each of {depth} layers")
    return {**pre_norm.read(text, _SIZES), "windows": tuple(windows)}


def _write(config: AdaptiveConfig) -> dict[str, Any]:
    shared = pre_norm.write(config, "transom_adaptive", "AdaptiveForCausalLM")  # type: ignore[arg-type]
    return {**shared, "layer_windows": list(config.windows)}


ARCHITECTURE = Architecture(
    name="adaptive",
    config=AdaptiveConfig,
    build=Adaptive,
    huggingface=HuggingFaceFormat(
        model_types={"transom_adaptive": None},
        classes=("AdaptiveForCausalLM",),
        sizes=_SIZES,
        supported=pre_norm.SUPPORTED,
        keys=(pre_norm.KEYS - {"layer_types"}) | {"layer_windows"},
        read=_read,
        write=_write,
        buffer=rope_buffer,
    ),
    gguf=None,
    presets=(
        Preset(
            config=AdaptiveConfig(
                name="adaptive-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
                head_dim=32, windows=(4, 16, None, 9), rope=Rope(theta=1e4), tied=False, context=512,
            )
        ),
    ),
    sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    with_windows=with_windows,
)  # fmt: skip
