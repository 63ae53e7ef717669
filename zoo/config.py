"""What every decoder's configuration says, whatever its family; a family's own stands in its model's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from transom.errors import ConfigError
from transom.graphs.images import Images
from transom.graphs.state import Port, Signature, State, ring
from transom.zoo.config_keys import is_positive

if TYPE_CHECKING:
    from transom.zoo.rope import RopeScaling

LayerKind = Literal["local", "global", "summary"]

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
"""No model comes near these sizes: a larger one is a damaged config. Runtimes count positions in 32 bits.

A family's own sizes are as many as heads at most.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """What one layer keeps of every position.

    Attributes:
        kv_heads: Heads of keys and values; 0 where the layer keeps none and reads what another one wrote.
        key_width: Width of a key.
        value_width: Width of a value.
        window: Keys that the layer sees, the newest included; None for all.
    """

    kv_heads: int
    key_width: int
    value_width: int
    window: int | None = None

    @property
    def kind(self) -> LayerKind:
        """Local if it has a window."""
        return "global" if self.window is None else "local"

    def states(self, index: int) -> tuple[State, ...]:
        """A ring of keys and one of values, of the layer with this index; none if it reads another one's."""
        return tuple(
            ring(f"cache.{index}.{kind}", layer=index, heads=self.kv_heads, width=width)
            for kind, width in (("key", self.key_width), ("value", self.value_width))
            if self.kv_heads
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummaryLayer:
    """What one layer keeps of all positions together: as much, however many there are.

    Attributes:
        summaries: Its states, named within the layer.
    """

    summaries: tuple[State, ...]
    kind: ClassVar[LayerKind] = "summary"
    window: ClassVar[None] = None

    def states(self, index: int) -> tuple[State, ...]:
        """Its states, as the layer with this index has them."""
        return tuple(
            dataclasses.replace(state, name=f"cache.{index}.{state.name}", layer=index) for state in self.summaries
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a text decoder. Every family's configuration adds what is its own.

    Attributes:
        name: What to call it in manifests and tables.
        architecture: Which model file builds it, one of `transom.zoo.architectures.ARCHITECTURES`.
        vocab_size: Rows of the embedding.
        hidden_size: Model width.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides `num_heads`.
        head_dim: Width of one head.
        norm_eps: Epsilon of every norm.
        context: Longest sequence the model was made for, in tokens.
        images: What an image is to a model that sees them; None for a text model.

    Raises:
        ConfigError: If a size is no whole number within bounds, a number is not positive and finite, or heads do not
            divide.
    """

    POSITIVE: ClassVar[tuple[str, ...]] = ("norm_eps",)
    """Numbers, by their path of attributes, that must be positive and finite; None is passed over."""
    SIZES: ClassVar[tuple[str, ...]] = (
        "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_layers",
        "context",
    )  # fmt: skip
    """Sizes that lie within `LARGEST`."""
    SCALED: ClassVar[tuple[str, ...]] = ()
    """Fields that hold the rotary embeddings of global layers."""

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    context: int
    images: Images | None = None

    def __post_init__(self) -> None:
        for name in self.SIZES:
            self._check_size(name)
        for name in self.POSITIVE:
            value: Any = self
            for attribute in name.split("."):
                value = getattr(value, attribute)
            if value is not None and not is_positive(value):
                raise ConfigError(f"{self.name}: {name} is {value!r}, expected a positive finite number")
        self._check_heads(self.num_kv_heads, self.head_dim)

    def _check_heads(self, num_kv_heads: int, head_dim: int) -> None:
        if self.num_heads % num_kv_heads:
            raise ConfigError(f"{self.name}: {self.num_heads} query heads cannot share {num_kv_heads} kv heads")
        if (width := self.num_heads * head_dim) > LARGEST["hidden_size"]:
            raise ConfigError(
                f"{self.name}: {self.num_heads} heads of {head_dim} are {width:,} wide, at most "
                f"{LARGEST['hidden_size']:,} are supported"
            )
        if head_dim % 2:
            raise ConfigError(f"{self.name}: rotary embedding needs an even head_dim, got {head_dim}")

    def _check_size(self, name: str) -> None:
        size: Any = getattr(self, name)
        most = LARGEST.get(name, LARGEST["num_heads"])
        if type(size) is not int or not 1 <= size <= most:
            raise ConfigError(f"{self.name}: {name} is {size!r}, expected a whole number from 1 to {most:,}")

    def scaled(self, scaling: RopeScaling) -> Self:
        """The same model for a context that is longer by a factor, its global layers' positions stretched.

        Raises:
            ConfigError: If no global layer rotates queries and keys, or their rotation is scaled already.
        """
        if not self.SCALED or all(layer.kind != "global" for layer in self.layers):
            raise ConfigError(f"{self.name}: no global layer rotates queries and keys: there is nothing to scale")
        try:
            ropes: dict[str, Any] = {name: scaling.stretch(getattr(self, name), self.context) for name in self.SCALED}
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        return dataclasses.replace(self, context=int(self.context * scaling.factor), **ropes)

    @property
    def layers(self) -> Sequence[AttentionLayer | SummaryLayer]:
        """What every layer keeps, first to last."""
        raise NotImplementedError

    @property
    def states(self) -> tuple[State, ...]:
        """What it keeps from call to call, layer by layer."""
        return tuple(state for index, layer in enumerate(self.layers) for state in layer.states(index))

    @property
    def text(self) -> DecoderConfig:
        """The text decoder alone: itself, if it sees no images."""
        return self

    @property
    def inputs(self) -> Mapping[str, Port]:
        """What the module's `hidden` takes beside tokens, their start and caches, by keyword."""
        return {}

    @property
    def encoders(self) -> Mapping[str, Signature]:
        """Other methods of the module that are entries of an artifact, by name."""
        return {}

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def longest_window(self) -> int | None:
        """The longest window of the local layers; None if there are none."""
        return max((layer.window for layer in self.layers if layer.window is not None), default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalGlobalConfig(DecoderConfig):
    """A text decoder each of whose layers is local or global, and equal in everything else.

    Attributes:
        layer_kinds: Kind of every layer, first to last.
        window: Keys that a local layer sees, itself included; None if no layer is local.
    """

    layer_kinds: tuple[LayerKind, ...]
    window: int | None

    def __post_init__(self) -> None:
        if self.window is not None or "local" in self.layer_kinds:
            self._check_size("window")
        super().__post_init__()

    @property
    def layers(self) -> tuple[AttentionLayer, ...]:
        """What every layer keeps, first to last."""
        windows = {"local": self.window, "global": None}
        return tuple(
            AttentionLayer(
                kv_heads=self.num_kv_heads, key_width=self.head_dim, value_width=self.head_dim, window=windows[kind]
            )
            for kind in self.layer_kinds
        )


def tile(pattern: str, num_layers: int) -> tuple[LayerKind, ...]:
    """Repeat a pattern such as "LLLLLG" and cut it to `num_layers`."""
    kinds: dict[str, LayerKind] = {"L": "local", "G": "global"}
    return tuple(kinds[pattern[index % len(pattern)]] for index in range(num_layers))


_Config = TypeVar("_Config", bound=DecoderConfig)


def read_decoder(path: Path, kind: Callable[..., _Config], *, name: str, **fields: Any) -> _Config:
    """A configuration that was read from a file, which its errors name.

    Raises:
        ConfigError: As `DecoderConfig` does.
    """
    try:
        return kind(name=name, **fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{name}: ')}") from None
