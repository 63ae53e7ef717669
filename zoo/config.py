"""What a decoder is, as data: one frozen record for the model and one for each kind of layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from transom.errors import ConfigError
from transom.zoo.config_keys import is_positive

LayerKind = Literal["local", "global"]

LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "num_layers": 2**10,
    "window": 2**31 - 1,
    "context": 2**31 - 1,
}
"""No model comes near these sizes: a larger one is a damaged config. Runtimes count positions in 32 bits."""


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

    Raises:
        ConfigError: If a size is no whole number within bounds, a number is not positive and finite, or heads do not
            divide.
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
        sizes: dict[str, Any] = {
            **{name: getattr(self, name) for name in LARGEST if name != "num_layers"},
            "num_layers": len(self.layer_kinds),
        }
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= LARGEST[name]:
                raise ConfigError(
                    f"{self.name}: {name} is {size!r}, expected a whole number from 1 to {LARGEST[name]:,}"
                )
        numbers: dict[str, Any] = {
            "rope_local.theta": self.rope_local.theta,
            "rope_local.factor": self.rope_local.factor,
            "rope_global.theta": self.rope_global.theta,
            "rope_global.factor": self.rope_global.factor,
            "attention_scale": self.attention_scale,
            "norm_eps": self.norm_eps,
            **({} if self.logit_softcap is None else {"logit_softcap": self.logit_softcap}),
        }
        for name, value in numbers.items():
            if not is_positive(value):
                raise ConfigError(f"{self.name}: {name} is {value!r}, expected a positive finite number")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.name}: {self.num_heads} query heads cannot share {self.num_kv_heads} kv heads")
        if (width := self.num_heads * self.head_dim) > LARGEST["hidden_size"]:
            raise ConfigError(
                f"{self.name}: {self.num_heads} heads of {self.head_dim} are {width:,} wide, at most "
                f"{LARGEST['hidden_size']:,} are supported"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.name}: rotary embedding needs an even head_dim, got {self.head_dim}")

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


def read_decoder(path: Path, *, name: str, **fields: Any) -> DecoderConfig:
    """A configuration that was read from a file, which its errors name.

    Raises:
        ConfigError: As `DecoderConfig` does.
    """
    try:
        return DecoderConfig(name=name, **fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{name}: ')}") from None
