"""What a decoder is, as data: one frozen record for the model and one for each kind of layer."""

from __future__ import annotations

import dataclasses
from typing import Literal

from transom.graphs.errors import ConfigError

LayerKind = Literal["local", "global"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: Base of the frequencies.
        factor: Linear position scaling; frequencies are divided by it.
    """

    theta: float
    factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A local:global text decoder.

    Attributes:
        name: What to call it in manifests and tables.
        architecture: Which model file builds it, a key of `transom.zoo.architectures.ARCHITECTURES`.
        vocab_size: Rows of the embedding.
        hidden_size: Model width.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides `num_heads`.
        head_dim: Width of one head.
        layer_kinds: Kind of every layer, first to last.
        window: Keys that a local layer sees, itself included.
        rope_local: Rotary embedding of local layers.
        rope_global: Rotary embedding of global layers.
        attention_scale: Factor on the scores.
        norm_eps: Epsilon of every RMSNorm.
        context: Longest sequence the model was made for, in tokens.
        logit_softcap: `cap * tanh(logits / cap)` on the final logits, or None.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_kinds: tuple[LayerKind, ...]
    window: int
    rope_local: Rope
    rope_global: Rope
    attention_scale: float
    norm_eps: float = 1e-6
    context: int
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        sizes = {
            field: getattr(self, field)
            for field in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        } | {"window": self.window, "context": self.context}
        if bad := {name: value for name, value in sizes.items() if value < 1}:
            raise ConfigError(f"{self.name}: sizes must be positive, got {bad}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.name}: {self.num_heads} query heads cannot share {self.num_kv_heads} kv heads")
        if self.head_dim % 2:
            raise ConfigError(f"{self.name}: rotary embedding needs an even head_dim, got {self.head_dim}")
        if not self.layer_kinds:
            raise ConfigError(f"{self.name}: a decoder needs at least one layer")

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_kinds)

    def layer_window(self, index: int) -> int | None:
        """Window of one layer in keys; None for a global layer."""
        return self.window if self.layer_kinds[index] == "local" else None


def tile(pattern: str, num_layers: int) -> tuple[LayerKind, ...]:
    """Repeat a pattern such as "LLLLLG" and cut it to `num_layers`."""
    kinds: dict[str, LayerKind] = {"L": "local", "G": "global"}
    return tuple(kinds[pattern[index % len(pattern)]] for index in range(num_layers))
