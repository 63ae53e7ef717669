"""Mamba-2's configuration: sizes, and how a `config.json` says them.

Source: transformers 5.23, `mamba2`. What is computed with them stands in `mamba2`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from transom.errors import ConfigError
from transom.graphs.state import summary
from transom.zoo.architecture import HuggingFaceFormat
from transom.zoo.config import LARGEST, AttentionLayer, DecoderConfig, SummaryLayer
from transom.zoo.config_keys import Keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(DecoderConfig):
    """A decoder of state spaces, some of whose layers may attend.

    The heads are those of the state space; `num_kv_heads` are its groups, whose heads share what they write and read,
    and `intermediate_size` is the width of all heads.

    Attributes:
        depth: Number of layers.
        state_size: Numbers that a head keeps for each number of its input.
        taps: Inputs that the convolution sees, the newest included.
        tied: Whether the head is the table of tokens.
        attention_layers: Indices of the layers that attend.
        attention_heads: Their query heads.
        attention_kv_heads: Their key/value heads.
        attention_width: Width of one of these heads.
    """

    SIZES = (
        *DecoderConfig.SIZES, "state_size", "taps", "attention_heads", "attention_kv_heads", "attention_width",
    )  # fmt: skip

    architecture: str = "mamba2"
    depth: int
    state_size: int
    taps: int = 4
    tied: bool
    attention_layers: tuple[int, ...] = ()
    attention_heads: int = 1
    attention_kv_heads: int = 1
    attention_width: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads * self.head_dim != self.intermediate_size or self.intermediate_size % self.hidden_size:
            raise ConfigError(
                f"{self.name}: {self.num_heads} heads of {self.head_dim} are {self.num_heads * self.head_dim} wide, "
                f"expected {self.intermediate_size}, a multiple of the model's {self.hidden_size}"
            )
        if self.taps < 2:
            raise ConfigError(f"{self.name}: a convolution of {self.taps} taps keeps nothing: give 2 or more")
        ascending = tuple(sorted({*self.attention_layers}))
        if self.attention_layers != ascending or not all(0 <= layer < self.depth for layer in ascending):
            raise ConfigError(
                f"{self.name}: attention_layers are {list(self.attention_layers)}, expected layers from 0 to "
                f"{self.depth - 1}, ascending"
            )
        if self.attention_heads % self.attention_kv_heads:
            raise ConfigError(
                f"{self.name}: {self.attention_heads} attention heads cannot share {self.attention_kv_heads} kv heads"
            )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.depth

    @property
    def channels(self) -> int:
        """Width of what is convolved: the heads' inputs, and what their groups write and read."""
        return self.intermediate_size + 2 * self.num_kv_heads * self.state_size

    @property
    def layers(self) -> tuple[AttentionLayer | SummaryLayer, ...]:
        """What every layer keeps."""
        width = self.attention_width
        attention = AttentionLayer(kv_heads=self.attention_kv_heads, key_width=width, value_width=width)
        space = SummaryLayer(
            summaries=(
                summary("convolution", inputs=self.taps - 1, channels=self.channels),
                summary("state", dtype="float32", heads=self.num_heads, width=self.head_dim, state=self.state_size),
            )
        )
        return tuple(attention if index in self.attention_layers else space for index in range(self.depth))


# Class defaults of Mamba2Config, transformers 5.23. What bounds the context stands in no key of theirs.
_SIZES = {
    "vocab_size": 32_768,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_heads": 128,
    "n_groups": 8,
    "head_dim": 64,
    "state_size": 128,
    "conv_kernel": 4,
    "expand": 2,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_heads": "num_heads",
    "num_kv_heads": "n_groups",
    "head_dim": "head_dim",
    "state_size": "state_size",
    "taps": "conv_kernel",
}
_ATTENTION = {
    "attention_heads": "num_attention_heads",
    "attention_kv_heads": "num_key_value_heads",
    "attention_width": "attention_head_dim",
}
CONTEXT = 2**20
_HYBRID = "mamba2_attention"
"""Model type of a hybrid, a name of our own: transformers' `mamba2` has no layers that attend."""


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    sizes = {field: text.whole(key, _SIZES[key]) for field, key in _FIELDS.items()}
    attention: dict[str, Any] = {}
    if text.get("model_type") == _HYBRID:
        attention = {field: text.whole(key, 0) for field, key in _ATTENTION.items()}
        layers = text.get("attention_layers")
        if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
            text.refuse("attention_layers", "expected a list of layers")
        attention["attention_layers"] = tuple(layers)
    return {
        **sizes,
        **attention,
        "tied": text.flag("tie_word_embeddings", False),
        "intermediate_size": text.whole("expand", _SIZES["expand"]) * sizes["hidden_size"],
        "depth": text.whole("num_hidden_layers", _SIZES["num_hidden_layers"], LARGEST["num_layers"]),
        "norm_eps": text.number("layer_norm_epsilon", 1e-5),
        "context": text.whole("max_position_embeddings", CONTEXT),
    }


def _write(config: Mamba2Config) -> dict[str, Any]:
    hybrid = bool(config.attention_layers)
    attention = {key: getattr(config, field) for field, key in _ATTENTION.items()}
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": _HYBRID if hybrid else "mamba2",
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        **({**attention, "attention_layers": list(config.attention_layers)} if hybrid else {}),
        "num_hidden_layers": config.depth,
        "expand": config.intermediate_size // config.hidden_size,
        "layer_norm_epsilon": config.norm_eps,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        # What begins and ends a text stands in the tokenizer's files and in generation_config.json.
        "bos_token_id": None,
        "eos_token_id": None,
    }


HUGGINGFACE = HuggingFaceFormat(
    model_types={"mamba2": None, _HYBRID: None},
    classes=("Mamba2ForCausalLM",),
    sizes=_SIZES,
    supported={
        "hidden_act": ("silu",),
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "residual_in_fp32": (True,),
        # Steps are positive anyway. The second is how transformers 5 writes infinity.
        "time_step_limit": ([0.0, math.inf], [0.0, {"__float__": "Infinity"}]),
    },
    # Of kernels that do as the rest does.
    not_applied=("norm_before_gate", "rms_norm"),
    keys=frozenset(
        {
            *_ATTENTION.values(), "attention_layers", "layer_norm_epsilon", "max_position_embeddings",
            "tie_word_embeddings",
        }
    ),
    # Of drawing weights, and of how many tokens are scanned at once.
    ignored=frozenset(
        {
            "time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual",
            "chunk_size",
        }
    ),
    renames={"backbone.embeddings.": "model.embed_tokens.", "backbone.norm_f.": "model.norm.", "backbone.": "model."},
    read=_read,
    write=_write,
    buffer=lambda config, name: None,
)  # fmt: skip
