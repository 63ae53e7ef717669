"""One text through a session: how far its logits are from the oracle's, and how likely they make the text.

Logits of 262,144 tokens are never kept: a target's stand in memory for one call, the oracle's for a few positions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.prompt import Prompt
from transom.backends.session import Session

ROWS = 64
"""Positions compared at a time: 64 MiB of logits of a vocabulary of 262,144."""

Logits = Callable[[int, int], torch.Tensor]
"""Logits [R, V] of the positions first to last + 1."""

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """One number a position, [T] each but for the last two; NaN where logits are not finite.

    Attributes:
        max_abs: Largest difference of any logit.
        magnitude: Largest logit of the oracle, by absolute value.
        kl: KL(oracle || target), in nats.
        gap: How much likelier, in logits of the oracle, its best token is than the target's; 0 where they agree.
        log_likelihood: Log probability that the target gives the token that follows in the text, in nats, [T], or
            [T - 1] where the last position is the text's last.
        kl_unquantized: KL(unquantised oracle || target), in nats, [T], or [0] if that was left out.
    """

    first: int
    max_abs: Array
    magnitude: Array
    kl: Array
    gap: Array
    log_likelihood: Array
    kl_unquantized: Array

    @property
    def relative(self) -> Array:
        """`max_abs` as a share of `magnitude`."""
        return np.asarray(self.max_abs / np.maximum(self.magnitude, np.finfo(np.float32).tiny))

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same likeliest token."""
        return float((self.gap == 0).mean())

    @staticmethod
    def join(parts: Sequence[Differences]) -> Differences:
        """Parts of one run, in order."""
        names = [field.name for field in dataclasses.fields(Differences) if field.name != "first"]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Differences(first=parts[0].first, **arrays)


def compare(
    logits: NDArray[np.float32],
    expected: Logits,
    first: int,
    *,
    following: Sequence[int] = (),
    unquantized: Logits | None = None,
) -> Differences:
    """Compare a target's logits [T, V] with the oracle's, a few positions at a time.

    `first` is the position of the first row; `following` the token after each one, [T], or [T - 1] at a text's end.
    """
    parts = []
    for low in range(0, len(logits), ROWS):
        rows = torch.from_numpy(np.ascontiguousarray(logits[low : low + ROWS]))
        span = first + low, first + low + len(rows)
        after = following[low : low + ROWS]
        parts.append(compare_rows(rows, expected(*span), span[0], after, unquantized and unquantized(*span)))
    return Differences.join(parts)


def compare_rows(
    rows: torch.Tensor,
    expected: torch.Tensor,
    first: int,
    following: Sequence[int] = (),
    unquantized: torch.Tensor | None = None,
) -> Differences:
    """Like `compare`, of logits [R, V] that stand in memory together."""
    best, chosen = expected.argmax(-1, keepdim=True), rows.argmax(-1, keepdim=True)
    gap = (expected.gather(1, best) - expected.gather(1, chosen))[:, 0]
    # Also of a NaN, which torch calls the largest of all, the gap must not be a number.
    gap = torch.where(rows.gather(1, chosen)[:, 0].isnan(), torch.nan, gap)
    log_q = rows.log_softmax(-1)
    return Differences(
        first=first,
        max_abs=_array((rows - expected).abs().amax(-1)),
        magnitude=_array(expected.abs().amax(-1)),
        kl=_kl(expected.log_softmax(-1), log_q),
        gap=_array(gap),
        log_likelihood=_array(log_q[range(len(following)), list(following)]),
        kl_unquantized=np.empty(0) if unquantized is None else _kl(unquantized.log_softmax(-1), log_q),
    )


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Array:
    """KL(p || q) in nats of log probabilities [R, V], row by row."""
    terms = log_p.exp() * (log_p - log_q)
    # Rounding can leave a sum of almost nothing below zero.
    return _array(terms.sum(-1, dtype=torch.float64).clamp(min=0))


def _array(values: torch.Tensor) -> Array:
    return values.double().numpy()


def counter(report: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Adds up counts, and reports (done, total)."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return advance


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
    tokens: Sequence[int] | Prompt,
    expected: Logits,
    *,
    step: int,
    first: int = 0,
    unquantized: Logits | None = None,
    on_tokens: Callable[[int], None],
) -> Measurement:
    """Run a text from empty caches, `step` tokens at once, whose logits stand in memory together; no image is cut.

    From position `first` on, its logits are compared with those of the oracle, which has read the tokens, and with
    those of the unquantised oracle if that is given. The target's may be NaN: the differences say where they are.
    Where there are images, no likelihood of what follows is taken.
    """
    prompt = Prompt.of(tokens)
    session.refuses_nonfinite = False
    session.reset()
    began = time.perf_counter()
    if first:
        session.prefill(prompt.before(first), on_chunk=on_tokens)
    before, seconds = time.perf_counter() - began, 0.0
    parts = []
    # Fed a step at a time, so that no logits outlive their comparison.
    for low, high in _spans(prompt, first, step):
        calls = session.feed(prompt.before(high).after(low), wanted="all")
        while True:
            began = time.perf_counter()
            # The runtime may take a step in two, where a ring ends within it.
            logits = next(calls, None)
            seconds += time.perf_counter() - began
            if logits is None:
                break
            position = session.position - len(logits)
            following = () if prompt.soft is not None else prompt.tokens[position + 1 : session.position + 1].tolist()
            parts.append(compare(logits, expected, position, following=following, unquantized=unquantized))
            on_tokens(len(logits))
            del logits
    return Measurement(Differences.join(parts), seconds, before)


def _spans(prompt: Prompt, first: int, step: int) -> Iterator[tuple[int, int]]:
    """First and end of what is fed at once, `step` tokens or an image at most."""
    blocks = prompt.blocks()
    while first < len(prompt):
        stop = min(first + step, len(prompt))
        for low, high in blocks:
            if low < stop < high:
                stop = low if low > first else high
        yield first, stop
        first = stop
