"""Which prompts to run: window bugs show at the window's edges, where a ring of slots wraps, and past both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transom.errors import ContextLengthError
from transom.graphs.state import State

NEW_TOKENS = 32
"""Tokens of the greedy continuation."""

SPAN = 64
"""Stands for the window of a model that has none, where lengths are chosen."""

AROUND = 4
"""Tokens decoded one by one before a boundary, and again after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a target is run on.

    Attributes:
        decodes: Spans (first, last + 1) of positions that are decoded one by one after a prefill of `first` tokens.
        continued: Length of the prompt whose greedy continuation is compared.
        new_tokens: Tokens of that continuation.
        not_reached: What the context leaves untested, in words.
    """

    prompts: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]
    continued: int
    new_tokens: int
    not_reached: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Length of the longest prompt."""
        return self.prompts[-1]

    @property
    def positions(self) -> int:
        """Tokens to run in all."""
        return sum(self.prompts) + sum(stop for _, stop in self.decodes) + self.continued + self.new_tokens


def default_chunk(window: int | None, context: int, image: int = 0) -> int:
    """A chunk longer than the window, so that a single call crosses it, and than an image's tokens."""
    longest = max(window or SPAN, image)
    return min(longest + longest // 2, context)


def default_context(window: int | None, most: int, image: int = 0) -> int:
    """A context that holds the longest prompt and its continuation, rounded up to a power of two.

    With the tokens of an image, one that stands across the wrap of the longest ring, too.
    """
    needed = 4 * (window or SPAN) + 3 + NEW_TOKENS
    if image:
        needed = max(needed, (window or SPAN) + 2 * default_chunk(window, most, image) + image + 2 * AROUND)
    return min(most, 1 << (needed - 1).bit_length())


def text_length(*, window: int | None, context: int, chunk: int) -> int:
    """Tokens of text that a schedule reads: the longest prompt, or to where the largest ring has wrapped.

    Raises:
        ContextLengthError: If the context is too short for any comparison.
    """
    if context < 2:
        raise ContextLengthError(f"a context of {context} leaves nothing to compare: export with a larger --context")
    window = window or SPAN
    return min(context, max(4 * window + 3, window + chunk - 1 + AROUND))


def schedule(*, window: int | None, context: int, chunk: int, states: Sequence[State]) -> Schedule:
    """Choose lengths: W-1, W, W+1, 2W, 3W+5 and 4W+3, as far as the context holds them.

    The window is None where all layers are global; rings among the states wrap at their numbers of slots.

    Raises:
        ContextLengthError: If the context is too short for any comparison.
    """
    most = text_length(window=window, context=context, chunk=chunk)
    edge, window = window, window or SPAN
    wanted = (window - 1, window, window + 1, 2 * window, 3 * window + 5, 4 * window + 3)
    prompts = tuple(sorted({min(length, context) for length in wanted if length > 0}))
    rings = {state.slots for state in states if state.window is not None and state.slots is not None}
    boundaries = {slots: f"the wrap of a ring of {slots:,} slots" for slots in rings}
    if edge is not None:
        boundaries[edge] = f"the edge of the window of {edge:,}"
    # A second turn of a ring is worth no text of its own.
    again = {2 * slots for slots in rings if 2 * slots + AROUND <= prompts[-1]}
    reached = {boundary for boundary in boundaries if boundary + AROUND <= most} | again
    decodes = [(max(boundary - AROUND, 1), boundary + AROUND) for boundary in sorted(reached) if boundary > 1]
    missed = [f"decoding over {name}" for boundary, name in sorted(boundaries.items()) if boundary not in reached]
    missed += [f"a prompt of {length:,}" for length in wanted if length > context]
    continued = max(1, min(3 * window + 5, context - NEW_TOKENS + 1))
    return Schedule(
        prompts=prompts,
        decodes=tuple(decodes),
        continued=continued,
        new_tokens=min(NEW_TOKENS, context - continued + 1),
        not_reached=tuple(f"{name}: the {'context' if most == context else 'text'} ends before it" for name in missed),
    )
