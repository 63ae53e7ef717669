"""Ministral 3's text decoder, as textbook tensor code, and all that is known of its files.

Source: transformers' `ministral3`. Positions are scaled by YaRN, and queries grow with their position, by the logarithm
of how many original contexts lie before it (as in Llama 4). Layers all have one window, or, in released sizes, none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from transom.errors import ConfigError
from transom.zoo import pre_norm
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import USUAL_NEUTRAL, Sizes, neighbours_to_halves
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config import tile
from transom.zoo.config_keys import Keys
from transom.zoo.layers import Rotation
from transom.zoo.rope import YarnRope, rotate, rotation
from transom.zoo.rope_keys import rope_buffer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ministral3Config(pre_norm.PreNormConfig):
    """A decoder whose queries grow with their position.

    Attributes:
        query_growth: Factor on the logarithm by which queries grow; 0 for none.
    """

    architecture: str = "ministral3"
    rope: YarnRope
    query_growth: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.query_growth < float("inf"):
            raise ConfigError(f"{self.name}: query_growth is {self.query_growth!r}, expected a number from 0 on")


class Ministral3Attention(pre_norm.RotatedAttention):
    """Attention whose queries are rotated by other numbers than its keys."""

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cos_sin is not None
        return rotate(self.split(q_BTX), *cos_sin[:2]), rotate(self.split(k_BTX), *cos_sin[2:])


class Ministral3(pre_norm.PreNormDecoder):
    """The decoder."""

    config: Ministral3Config
    attention = Ministral3Attention

    def rotations(self, positions_T: torch.Tensor) -> list[Rotation]:
        """Queries grow as they are rotated, so that all layers share one product."""
        cos_TH, sin_TH = rotation(positions_T, self.config.rope, self.config.head_dim)
        contexts_T = torch.floor(positions_T.float() / self.config.rope.original_context)
        growth_T1 = (1 + self.config.query_growth * torch.log(1 + contexts_T))[:, None]
        return [(cos_TH * growth_T1, sin_TH * growth_T1, cos_TH, sin_TH)] * self.config.num_layers


# Class defaults of Ministral3Config, transformers 5.23.
_SIZES = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
}
_GROWTH = "llama_4_scaling_beta"


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    window = None if text.get("sliding_window") is None else text.whole("sliding_window", 1)
    # transformers never reads the context that it writes beside the rotary embedding's parameters.
    fields = pre_norm.read(text, _SIZES, eps=1e-5, rope_keys=(_GROWTH, "max_position_embeddings"))
    if not isinstance(fields["rope"], YarnRope):
        text.refuse("rope_parameters", "expected rope_type yarn")
    growth = {**text.mapping("rope_scaling"), **text.mapping("rope_parameters")}.get(_GROWTH)
    if isinstance(growth, bool) or not isinstance(growth, int | float):
        text.refuse("rope_parameters", f"expected a number for {_GROWTH}")
    layers = pre_norm.read_uniform(text, pre_norm.read_depth(text, _SIZES), window)
    return {**fields, **layers, "query_growth": float(growth)}


def _write(config: Ministral3Config) -> dict[str, Any]:
    data = pre_norm.write(config, "ministral3", "Ministral3ForCausalLM")
    data["rope_parameters"][_GROWTH] = config.query_growth
    return {**data, "sliding_window": config.window}


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"ministral3": None, "mistral3": "text_config"},
    classes=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    sizes=_SIZES,
    supported={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    keys=pre_norm.KEYS | {"sliding_window"},
    ignored=frozenset(
        {
            "vision_config", "image_token_index", "image_token_id", "spatial_merge_size", "projector_hidden_act",
            "vision_feature_layer", "multimodal_projector_bias",
        }
    ),
    read=_read,
    write=_write,
    buffer=rope_buffer,
)  # fmt: skip


def _read_gguf(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """Without attention.temperature_scale, queries do not grow."""
    fields = pre_norm.read_gguf(sizes, keys, lines)
    if not isinstance(fields["rope"], YarnRope):
        raise keys.refuse("rope.scaling.type", "only yarn is known: choose another model")
    return {**fields, "query_growth": keys.number("attention.temperature_scale", 0.0, zero=True)}


_GGUF = GGUFFormat(
    name="mistral3",
    neutral=USUAL_NEUTRAL,
    read=_read_gguf,
    tensors=pre_norm.GGUF_TENSORS,
    rows=neighbours_to_halves,
)


def _released(size: str, num_layers: int, width: int, mlp: int, theta: float, *, tied: bool = False) -> Preset:
    config = Ministral3Config(
        name=f"ministral3-{size.lower()}", layer_kinds=tile("G", num_layers), hidden_size=width, intermediate_size=mlp,
        num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=131_072, tied=tied, context=262_144, norm_eps=1e-5,
        rope=YarnRope(theta=theta, factor=16.0, original_context=16_384, attention_factor=1.0), query_growth=0.1,
    )  # fmt: skip
    return Preset(config=config, hub=f"mistralai/Ministral-3-{size}-Instruct-2512-BF16")


_PRESETS = (
    # Queries grow at positions that tests reach, and some pairs lie on the ramp.
    Preset(
        config=Ministral3Config(
            name="ministral3-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("G", 2), rope=YarnRope(theta=1e4, factor=16.0, original_context=32),
            query_growth=0.1, tied=True, context=512,
        )
    ),
    _released("3B", 26, 3072, 9216, 1e6, tied=True),
    _released("8B", 34, 4096, 14_336, 1e6),
    _released("14B", 40, 5120, 16_384, 1e9),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="ministral3",
    config=Ministral3Config,
    build=Ministral3,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.15},
)
