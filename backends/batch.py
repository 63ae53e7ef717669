"""Sequences of one length that are run together: prompts at once, then a token of each. Needs no torch.

Axes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.runtime import Call, Float, Runtime
from transom.backends.session import nonfinite
from transom.errors import SessionError
from transom.graphs.state import BATCH, SLOTS, State


class Batch:
    """Runs them, and drops those that end.

    Args:
        runtime: What runs them; its states are the batch's alone.

    Attributes:
        position: Tokens that the states hold of each.

    Raises:
        SessionError: If the runtime does not take several.
    """

    def __init__(self, runtime: Runtime) -> None:
        if not runtime.takes_rows:
            raise SessionError(f"{runtime.title} runs one sequence at a time here: give it one")
        self._runtime, self.position = runtime, 0

    def begin(self, prompts: Sequence[Sequence[int]], slots: int) -> Float:
        """Forget all sequences, and begin others; equal ones are run once.

        Args:
            prompts: Token ids, all of them as many, at least one.
            slots: Tokens that each will have at most.

        Returns:
            Logits of each one's last token, [B, V].

        Raises:
            SessionError: If the runtime fails.
            NonFiniteError: If logits are NaN or infinite.
        """
        distinct, copies = once(prompts)
        tokens_BT = np.array(distinct, np.int64)
        rows, length = tokens_BT.shape
        # A call that goes on with more than a token takes one row on some targets.
        together = rows if length <= self._runtime.chunk else 1
        logits, runs = [], []
        for low in range(0, rows, together):
            self._runtime.hold({}, together)
            self._runtime.allocate(slots)
            self.position = 0
            for first in range(0, length, self._runtime.chunk):
                last = self._run(tokens_BT[low : low + together, first : first + self._runtime.chunk])
            logits.append(last)
            runs.append({state.name: (state, array) for state, array in self._runtime.state_arrays()})
        if len(runs) > 1:
            joined = {
                name: np.concatenate([states[name][1] for states in runs], state.axes.index(BATCH))
                for name, (state, _) in runs[0].items()
            }
            self._runtime.hold(joined, rows)
        logits_BV = np.concatenate(logits)
        if rows == len(copies):
            return logits_BV
        self.take(copies)
        return logits_BV[copies]

    def decode(self, tokens_B: NDArray[np.int64]) -> Float:
        """Run a token of each; returns its logits [B, V]."""
        return self._run(tokens_B[:, None])

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order; each as often as it is named."""
        taken = {state.name: self._taken(state, array, rows) for state, array in self._runtime.state_arrays()}
        self._runtime.hold(taken, len(rows))

    def _taken(self, state: State, array: NDArray[Any], rows: Sequence[int]) -> NDArray[Any]:
        batch = state.axes.index(BATCH)
        new = np.zeros((*array.shape[:batch], len(rows), *array.shape[batch + 1 :]), array.dtype)
        # Slots that nothing was written to yet are zero, and cost no memory while nobody touches them.
        filled = tuple(slice(0, self.position if axis == SLOTS else None) for axis in state.axes)
        new[filled] = array[filled].take(rows, batch)
        return new

    def _run(self, tokens_BT: NDArray[np.int64]) -> Float:
        rows, count = tokens_BT.shape
        call = Call(
            tokens=np.ascontiguousarray(tokens_BT),
            start=np.full(rows, self.position),
            logit_positions=np.array([count - 1]),
        )
        logits_BV = self._runtime.run(call).logits[:, 0]
        if not np.isfinite(logits_BV).all():
            raise nonfinite(logits_BV, np.full(rows, self.position + count - 1))
        self.position += count
        return logits_BV


def once(prompts: Sequence[Sequence[int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prompts that differ, and which of them each prompt is."""
    places: dict[tuple[int, ...], int] = {}
    copies = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    return list(places), copies
