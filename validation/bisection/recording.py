"""The values of a run's taps, position by position, from any runtime. A call is the `range` of its positions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.backends.prompt import SOFT, Prompt
from transom.backends.runtime import Float
from transom.backends.session import Session
from transom.errors import ArtifactError
from transom.graphs.graph import Graph
from transom.graphs.images import Images
from transom.validation.bisection.context import LOGITS, Context, positions_axis

Run = Session | Callable[[Float], Mapping[str, NDArray[Any]]]
"""What decodes and may encode images, or what encodes them alone, as `Runtime.encode` does."""

DECODED = 24
"""Tokens decoded one by one after the prompt, at most; twice the window, but at least 12, where that is less."""

AROUND = (2, 2)
"""Single steps before and after the wrap of a ring of `window` slots, where the decoded tokens pass none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recording:
    """A run.

    Attributes:
        calls: The calls, from position 0 on without a gap; of an encoder one.
        values: By tap, in order of execution: float32 [T, ...], positions first, heads after them. `LOGITS` has one
            row a call, that of its last token.
    """

    calls: tuple[range, ...]
    values: Mapping[str, Float]


def positions_of(name: str, calls: Sequence[range]) -> NDArray[np.int64]:
    """Position of every row that a tap has after these calls."""
    return np.array([call[-1] for call in calls] if name == LOGITS else [*itertools.chain(*calls)])


def plan_calls(*, window: int, chunk: int, length: int | None = None, decode: int | None = None) -> tuple[range, ...]:
    """Calls that pass every edge: two whole chunks, a part of one, and single steps over the wraps of rings of slots.

    A ring has `window` slots where a runtime attends before it writes, `window + chunk - 1` where it writes first. By
    default single steps pass a multiple of both, in the midst of the prompt if need be; a prompt of a given `length`
    comes in whole chunks as far as they go. `decode` tokens follow one by one.
    """
    decode = max(12, min(2 * window, DECODED)) if decode is None else decode
    wanted = max(2 * (window + chunk - 1) - 6, 2 * window) if length is None else length
    before, after = AROUND
    wrap = -(-(2 * chunk + before) // window) * window
    is_decoded = (wanted // window + 1) * window < wanted + decode
    edges = [(0, wanted, chunk), (wanted, wanted + decode, 1)]
    if length is None and not is_decoded and wrap + after <= wanted:
        edges[:1] = [(0, wrap - before, chunk), (wrap - before, wrap + after, 1), (wrap + after, wanted, chunk)]
    return tuple(range(low, min(low + most, stop)) for start, stop, most in edges for low in range(start, stop, most))


def plan_image(graph: Graph) -> tuple[range, ...]:
    """The one call of an encoder with taps: as many positions as any tap has."""
    nodes = [graph.outputs[tap.name] for tap in graph.taps]
    return (range(max(node.meta["val"].shape[1 + positions_axis(node)] for node in nodes)),)


def with_images(tokens: Sequence[int], calls: Sequence[range], images: Images, width: int) -> Prompt:
    """A prompt in which an image of random soft tokens [Q, width] stands in every call that holds one."""
    ids, size, blocks = np.array(tokens, np.int64), images.soft_tokens, 0
    for call in calls:
        if (room := len(call) - size) >= 0:
            # In turns at the end of a call, and in its midst.
            first = call.start + (room // 2 if blocks % 2 else room - min(room, 1))
            ids[first : first + size], blocks = SOFT, blocks + 1
            for at, border in ((first - 1, images.begin_id), (first + size, images.end_id)):
                if 0 <= at < ids.size and ids[at] != SOFT:
                    ids[at] = border
    soft = np.random.default_rng(0).standard_normal((blocks * size, width), np.float32)
    return Prompt(tokens=ids, soft=soft)


def steps(run: Run, calls: Sequence[range], context: Context) -> Iterator[dict[str, Float]]:
    """Run the calls from empty caches; yields each one's taps, positions first, and its last logits [1, V].

    Of an encoder, it yields the taps of the one image, and its soft tokens.

    Raises:
        ArtifactError: If the taps do not show every token of a call.
    """

    def rows(name: str, value: NDArray[Any]) -> Float:
        first = np.moveaxis(np.asarray(value[0], np.float32), context.axis(name), 0)
        return np.ascontiguousarray(first)

    if context.pixels is not None:
        returned = (run.runtime.encode if isinstance(run, Session) else run)(context.pixels)
        yield {name: rows(name, returned[name]) for name in context.taps if name in returned}
        return
    assert isinstance(run, Session)
    session = run
    session.reset()
    session.refuses_nonfinite = False  # the first tap that holds them is what is looked for
    for call in calls:
        # The runtime may take a call in two, where a ring ends within it.
        parts: dict[str, list[Float]] = {}

        def keep(count: int, parts: dict[str, list[Float]] = parts) -> None:
            for name, value in session.tapped.items():
                if name in context.taps:
                    parts.setdefault(name, []).append(rows(name, value))

        logits = session.prefill(context.prompt.after(call.start, call.stop), on_chunk=keep)
        taps = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
        if short := [name for name, value in taps.items() if len(value) != len(call)]:
            raise ArtifactError(f"{short[0]} has {len(taps[short[0]])} positions for a call of {len(call)} tokens")
        yield {**taps, LOGITS: np.asarray(logits, np.float32)[None]}


def record(run: Run, calls: Sequence[range], context: Context, names: Collection[str] | None = None) -> Recording:
    """Run the calls and keep some taps, or all of them; all of a large model's would take gigabytes."""
    parts: dict[str, list[Float]] = {}
    for taps in steps(run, calls, context):
        for name, value in taps.items():
            if names is None or name in names:
                parts.setdefault(name, []).append(value.copy())
    return Recording(calls=tuple(calls), values={name: np.concatenate(part) for name, part in parts.items()})
