"""Where new tokens go in rings that wrap early, so that no call is cut at a ring's end. Needs no torch.

TensorRT writes a ring no further than its end. Calls of text are cut there; an image is not to be cut. A model that
takes images is therefore told in every call at which slot its new tokens go, and which position each slot then holds.
A call that does not fit before the end goes to the front. A ring needs `window + 2 * chunk - 2` slots for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from transom.graphs.state import SLOTS, Port, State

WRITE_SLOT, SLOT_POSITIONS = "write_slot", "slot_positions"


def ring_ports(states: Iterable[State]) -> dict[str, Port]:
    """What a model is told of its rings: two inputs for every number of slots, whose name ends in that number."""
    ports = {}
    for slots in sorted({state.slots for state in states if state.window is not None and state.slots is not None}):
        ports[f"{WRITE_SLOT}.{slots}"] = Port(axes=("batch",), dtype="int64", sizes=(1,))
        ports[f"{SLOT_POSITIONS}.{slots}"] = Port(axes=(SLOTS,), dtype="int64", sizes=(slots,))
    return ports


class Rings:
    """Where the tokens of a sequence stand in the rings of a model.

    Args:
        inputs: What the model takes, with `ring_ports` if it takes images.

    Attributes:
        positions: Of each slot, int64 [S], by the number of slots; negative where none stands.
    """

    def __init__(self, inputs: Mapping[str, Port]) -> None:
        sizes = [port.sizes[0] for name, port in inputs.items() if name.startswith(f"{SLOT_POSITIONS}.")]
        self.positions = {slots: np.full(slots, -1) for slots in sizes if slots is not None}

    def place(self, start: int, tokens: int) -> dict[str, NDArray[np.int64]]:
        """Find room for new tokens; returns the inputs of `ring_ports`.

        Args:
            start: Position of the first one; what stood there or later is forgotten.
            tokens: How many.
        """
        given = {}
        for slots, positions in self.positions.items():
            positions[positions >= start] = -1
            slot = int(positions.argmax()) + 1 if start else 0
            if slot + tokens > slots:
                slot = 0
            positions[slot : slot + tokens] = np.arange(start, start + tokens)
            given[f"{WRITE_SLOT}.{slots}"] = np.array([slot])
            given[f"{SLOT_POSITIONS}.{slots}"] = positions
        return given
