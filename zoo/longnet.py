"""A decoder with dilated attention, after LongNet (arXiv 2307.02486); a family of ours.

Section 2.2 cuts positions into segments of w and keeps every r-th row of each; attention runs among what is kept, for
several pairs (w, r) that grow together. What one head leaves out, another one keeps: head j begins at row j mod r of a
segment (section 2.3). We take the causal form, which a cache can decode:

- A token at position i sees the keys of its own segment, i // w, that stand whole steps of r before it. Those are the
  rows that section 2.2 keeps together with its own. Segments are counted from position 0, as in the authors' code.
- Every head sees that. In the paper a head has no result for tokens that are not among its rows, which one that decodes
  needs; all heads together take every row, as ours does, and a token reads as many keys: w / r.
- Pairs differ by layer, not within one: a softmax of its own for each of them, and a cache of what it reads.

A segment of None is the whole text: the layer reaches everything, sparsely.

What a later token can still read: in a segment, no key farther back than the largest multiple of r below w, so a layer
keeps as many positions and its own. No residue can be left out, as tokens of every residue follow; where r divides w,
all that is kept is yet to be read at some point of every segment. Where there are no segments, every key is.

No other library reads its checkpoints. Names of tensors are Llama's.

Axes: see `pre_norm`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from transom.errors import ConfigError
from transom.zoo import pre_norm
from transom.zoo.architecture import Architecture, HuggingFaceFormat, Preset
from transom.zoo.config import AttentionLayer, DecoderConfig
from transom.zoo.config_keys import Keys
from transom.zoo.rope import Rope
from transom.zoo.rope_keys import rope_buffer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongNetConfig(DecoderConfig):
    """A decoder whose layers are alike but for the segments and dilations of their attention.

    Attributes:
        segments: Length of each layer's segments; None for one that is never cut.
        dilations: Of every so many positions of a segment, each layer's tokens see one.
        rope: Rotary embedding.
        tied: Whether the head is the table of tokens.

    Raises:
        ConfigError: If they are not as many, or one is no positive whole number, beside what every configuration
            raises.
    """

    POSITIVE = ("rope.theta", "rope.factor", "norm_eps")
    SCALED = ("rope",)

    architecture: str = "longnet"
    segments: tuple[int | None, ...]
    dilations: tuple[int, ...]
    rope: Rope
    tied: bool

    def __post_init__(self) -> None:
        if len(self.segments) != len(self.dilations):
            raise ConfigError(f"{self.name}: {len(self.segments)} segments and {len(self.dilations)} dilations")
        for size in (*(segment for segment in self.segments if segment is not None), *self.dilations):
            if type(size) is not int or size < 1:
                raise ConfigError(f"{self.name}: a segment or dilation of {size!r}, expected a positive whole number")
        super().__post_init__()

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """What every layer keeps, first to last."""
        K, H = self.num_kv_heads, self.head_dim
        return tuple(
            AttentionLayer(kv_heads=K, key_width=H, value_width=H, window=_read_later(segment, dilation))
            for segment, dilation in zip(self.segments, self.dilations, strict=True)
        )


def _read_later(segment: int | None, dilation: int) -> int | None:
    """Newest positions that hold all keys that a token still reads, its own included; None for no bound."""
    return None if segment is None else (segment - 1) // dilation * dilation + 1


class DilatedAttention(pre_norm.RotatedAttention):
    """Attention among every so many positions of a segment."""

    def __init__(self, config: LongNetConfig, index: int) -> None:
        super().__init__(config, index)
        self.window, self.segment, self.dilation = None, config.segments[index], config.dilations[index]

    def pattern(self, positions_T1: torch.Tensor, keys_S: torch.Tensor) -> torch.Tensor:
        """Which keys each token sees, bool [T, S]."""
        seen_TS = (positions_T1 - keys_S) % self.dilation == 0
        return seen_TS if self.segment is None else seen_TS & (positions_T1 // self.segment == keys_S // self.segment)


class LongNet(pre_norm.PreNormDecoder):
    """The decoder."""

    attention = DilatedAttention


_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 32_768,
}
"""Of the paper's experiments (section 4.1)."""


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    depth = pre_norm.read_depth(text, _SIZES)
    given = {key: text.get(f"layer_{key}") for key in ("segments", "dilations")}
    for key, value in given.items():
        if not isinstance(value, list) or len(value) != depth:
            text.refuse(f"layer_{key}", f"expected a whole number for each of {depth} layers")
    return {**pre_norm.read(text, _SIZES), **{key: tuple(value) for key, value in given.items()}}


def _write(config: LongNetConfig) -> dict[str, Any]:
    shared = pre_norm.write(config, "transom_longnet", "LongNetForCausalLM")  # type: ignore[arg-type]
    return {**shared, "layer_segments": list(config.segments), "layer_dilations": list(config.dilations)}


ARCHITECTURE = Architecture(
    name="longnet",
    config=LongNetConfig,
    build=LongNet,
    huggingface=HuggingFaceFormat(
        model_types={"transom_longnet": None},
        classes=("LongNetForCausalLM",),
        sizes=_SIZES,
        supported=pre_norm.SUPPORTED,
        keys=(pre_norm.KEYS - {"layer_types"}) | {"layer_segments", "layer_dilations"},
        read=_read,
        write=_write,
        buffer=rope_buffer,
    ),
    gguf=None,
    presets=(
        # Dense and short, longer and sparse, everything and sparse; 3 does not divide what 4 does.
        Preset(
            config=LongNetConfig(
                name="longnet-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
                head_dim=32, segments=(8, 16, None), dilations=(1, 4, 3), rope=Rope(theta=1e4), tied=False, context=512,
            )
        ),
    ),
    sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
)  # fmt: skip
