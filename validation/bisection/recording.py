"""The values of a run's taps, position by position, from any runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.session import Session
from transom.errors import ArtifactError
from transom.validation.bisection.context import LOGITS, Context

Float = NDArray[np.float32]

DECODED = 24
"""Tokens decoded one by one after the prompt, at most; twice the window, but at least 12, where that is less."""

AROUND = (2, 2)
"""Single steps before and after the wrap of a ring of `window` slots, where the decoded tokens pass none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a runtime: `count` new tokens from position `start` on."""

    start: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """A run.

    Attributes:
        calls: The calls, from position 0 on without a gap.
        values: By tap, in order of execution: float32 [T, ...], positions first, heads after them. `LOGITS` has one
            row a call, that of its last token.
    """

    calls: tuple[Call, ...]
    values: Mapping[str, Float]

    def positions(self, name: str) -> NDArray[np.int64]:
        """Position of every row of a tap."""
        return positions_of(name, self.calls)


def positions_of(name: str, calls: Sequence[Call]) -> NDArray[np.int64]:
    """Position of every row that a tap has after these calls."""
    if name == LOGITS:
        return np.array([call.start + call.count - 1 for call in calls])
    return np.concatenate([np.arange(call.start, call.start + call.count) for call in calls])


def plan_calls(*, window: int, chunk: int, length: int | None = None, decode: int | None = None) -> tuple[Call, ...]:
    """Calls that pass every edge: two whole chunks, a part of one, and single steps over the wraps of rings of slots.

    A ring has `window` slots where a runtime attends before it writes, `window + chunk - 1` where it writes first. By
    default single steps pass a multiple of both, in the midst of the prompt if need be.

    Args:
        window: Keys that a local layer sees.
        chunk: Most tokens in a call.
        length: Tokens of the prompt, in whole chunks as far as they go; by default so many that decoding soon comes to
            the second wrap of the longer ring.
        decode: Tokens to decode one by one.
    """
    decode = max(12, min(2 * window, DECODED)) if decode is None else decode
    if length is not None:
        return (*_chunks(0, length, chunk), *_chunks(length, length + decode, 1))
    length = max(2 * (window + chunk - 1) - 6, 2 * window)
    before, after = AROUND
    wrap = -(-(2 * chunk + before) // window) * window
    is_decoded = (length // window + 1) * window < length + decode
    if is_decoded or wrap + after > length:
        return (*_chunks(0, length, chunk), *_chunks(length, length + decode, 1))
    return (
        *_chunks(0, wrap - before, chunk),
        *_chunks(wrap - before, wrap + after, 1),
        *_chunks(wrap + after, length, chunk),
        *_chunks(length, length + decode, 1),
    )


def _chunks(start: int, stop: int, chunk: int) -> Iterator[Call]:
    for low in range(start, stop, chunk):
        yield Call(start=low, count=min(chunk, stop - low))


def steps(
    session: Session, calls: Sequence[Call], tokens: Sequence[int], axes: Mapping[str, int]
) -> Iterator[dict[str, Float]]:
    """Run the calls from empty caches; yields each one's taps, positions first, and its last logits [1, V].

    Args:
        session: What runs them.
        calls: The calls.
        tokens: Ids, from position 0 on.
        axes: Axis of positions, counted without the batch, of taps that do not have it first: see `Context.axes`.

    Raises:
        ArtifactError: If the taps do not show every token of a call.
    """
    session.reset()
    session.refuses_nonfinite = False  # the first tap that holds them is what is looked for
    for call in calls:
        # The runtime may take a call in two, where a ring ends within it.
        parts: dict[str, list[Float]] = {}

        def keep(count: int, parts: dict[str, list[Float]] = parts) -> None:
            for name, value in session.tapped.items():
                parts.setdefault(name, []).append(_positions_first(value, axes.get(name, 0)))

        logits = session.prefill(list(tokens[call.start : call.start + call.count]), on_chunk=keep)
        taps = {name: rows[0] if len(rows) == 1 else np.concatenate(rows) for name, rows in parts.items()}
        if short := [name for name, value in taps.items() if len(value) != call.count]:
            raise ArtifactError(f"{short[0]} has {len(taps[short[0]])} positions for a call of {call.count} tokens")
        yield {**taps, LOGITS: np.asarray(logits, np.float32)[None]}


def _positions_first(value: NDArray[Any], axis: int) -> Float:
    return np.ascontiguousarray(np.moveaxis(np.asarray(value[0], np.float32), axis, 0))


def record(
    session: Session, calls: Sequence[Call], context: Context, names: Collection[str] | None = None
) -> Recording:
    """Run the calls and keep some taps, or all of them; all of a large model's would take gigabytes."""
    parts: dict[str, list[Float]] = {}
    for taps in steps(session, calls, context.tokens, context.axes()):
        for name, value in taps.items():
            if names is None or name in names:
                parts.setdefault(name, []).append(value.copy())
    return Recording(calls=tuple(calls), values={name: np.concatenate(rows) for name, rows in parts.items()})
