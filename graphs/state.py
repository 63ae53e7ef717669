"""`State` and `Port`: what a graph keeps from call to call, and what a caller gives and gets. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

BATCH, SLOTS = "batch", "slots"


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """One tensor that a graph takes, changes and gives back.

    With an axis "slots" it is a ring: position p stands in slot p % S. A ring can be bounded, grown and partly rewound.
    Without one it is a summary of all positions so far, which can only be kept, zeroed or copied as a whole.

    Attributes:
        name: Of the graph's input and output alike, such as "cache.3.key".
        layer: Index of the layer that owns it.
        axes: Name of every axis.
        sizes: Size of every axis; None where the caller chooses it: sequences, and slots that grow with the context.
        dtype: "float32" and so on; "" in a declaration, for that of the computation.
        window: Positions that the readers of a ring see; None for all, or while unknown.
    """

    name: str
    layer: int
    axes: tuple[str, ...]
    sizes: tuple[int | None, ...]
    dtype: str
    window: int | None = None

    @property
    def is_ring(self) -> bool:
        """Whether it holds positions one by one."""
        return SLOTS in self.axes

    @property
    def slots(self) -> int | None:
        """Slots of a ring; None if they grow with the context, and for a summary."""
        return self.sizes[self.axes.index(SLOTS)] if self.is_ring else None

    @property
    def grows(self) -> bool:
        """Whether it takes the more memory the more positions there are."""
        return self.is_ring and self.slots is None

    @property
    def numbers(self) -> int:
        """How many numbers one sequence has in a slot of a ring, or in all of a summary."""
        return math.prod(
            size for axis, size in zip(self.axes, self.sizes, strict=True) if size and axis not in (BATCH, SLOTS)
        )

    def shape(self, slots: int, *, batch: int = 1) -> tuple[int, ...]:
        """Its shape with all sizes chosen.

        Args:
            slots: Slots if they grow.
            batch: Sequences.
        """
        chosen = {BATCH: batch, SLOTS: slots}
        return tuple(chosen[axis] if size is None else size for axis, size in zip(self.axes, self.sizes, strict=True))

    def fixed(self, **sizes: int) -> State:
        """With sizes, by axis, for those that the caller would choose."""
        pairs = zip(self.axes, self.sizes, strict=True)
        return dataclasses.replace(self, sizes=tuple(sizes.get(axis) if size is None else size for axis, size in pairs))


def by_layer(states: Iterable[State]) -> list[list[State]]:
    """States as modules take them: one list a layer that owns some."""
    layers: dict[int, list[State]] = {}
    for state in states:
        layers.setdefault(state.layer, []).append(state)
    return list(layers.values())


def ring(name: str, *, layer: int, heads: int, width: int, dtype: str = "") -> State:
    """A cache of keys or of values [batch, heads, slots, width] that grows with the context."""
    sizes = (None, heads, None, width)
    return State(name=name, layer=layer, axes=(BATCH, "heads", SLOTS, "width"), sizes=sizes, dtype=dtype)


def summary(name: str, *, layer: int = 0, dtype: str = "", **sizes: int) -> State:
    """A summary of all positions so far, with sizes by axis beside the batch's."""
    return State(name=name, layer=layer, axes=(BATCH, *sizes), sizes=(None, *sizes.values()), dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Port:
    """A tensor that a caller gives, or gets, at every call.

    Attributes:
        axes: Name of every axis.
        dtype: "float32" and so on.
        sizes: Size of every axis; None where the caller chooses it. Empty where none is fixed.
    """

    axes: tuple[str, ...]
    dtype: str
    sizes: tuple[int | None, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """What an entry without states takes and gives, such as an encoder of images.

    Attributes:
        inputs: By name; all sizes are fixed.
        outputs: Names of the axes of every output, by its name.
    """

    inputs: Mapping[str, Port]
    outputs: Mapping[str, tuple[str, ...]]
