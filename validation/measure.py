"""The one loop that measures: a text through a session, its logits compared call by call with a model's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transom.backends.session import Session
from transom.validation.compare import Differences, Logits, compare


class Measurement(NamedTuple):
    """What a text gave.

    Attributes:
        differences: From the position `first` on.
        seconds: Time of the target alone, from there on.
        seconds_before: That of the positions before it.
    """

    differences: Differences
    seconds: float
    seconds_before: float


def measure(
    session: Session,
    tokens: Sequence[int],
    expected: Logits,
    *,
    step: int,
    first: int = 0,
    unquantized: Logits | None = None,
    on_tokens: Callable[[int], None],
) -> Measurement:
    """Run a text from empty caches, `step` tokens at once, whose logits stand in memory together.

    From position `first` on, its logits are compared with those of the oracle, which has read the tokens, and with
    those of the unquantised oracle if that is given. The target's may be NaN: the differences say where they are.
    """
    session.refuses_nonfinite = False
    session.reset()
    began = time.perf_counter()
    if first:
        session.prefill(tokens[:first], on_chunk=on_tokens)
    before, seconds = time.perf_counter() - began, 0.0
    parts = []
    # Fed a step at a time, so that no logits outlive their comparison.
    for low in range(first, len(tokens), step):
        calls = session.feed(tokens[low : low + step], wanted="all")
        while True:
            began = time.perf_counter()
            # The runtime may take a step in two, where a ring ends within it.
            logits = next(calls, None)
            seconds += time.perf_counter() - began
            if logits is None:
                break
            position = session.position - len(logits)
            following = tokens[position + 1 : session.position + 1]
            parts.append(compare(logits, expected, position, following=following, unquantized=unquantized))
            on_tokens(len(logits))
            del logits
    return Measurement(Differences.join(parts), seconds, before)
