"""How likely a text is, and how far from the oracle's distribution, token by token.

Logits of 262,144 tokens are never kept: a target's stand in memory for one call, the oracle's for a few positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.session import Session
from transom.validation.compare import ROWS, Array, Logits, kl
from transom.validation.evaluation.text import Text
from transom.validation.oracle import Reading

CALL = 256
"""Most positions whose logits are computed at once: 256 MiB of Gemma's vocabulary."""

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """One number a scored token, [N] each, sequence after sequence.

    Attributes:
        log_likelihood: Log probability of the token given those before it, in nats.
        kl: KL(oracle || target) of the distribution that it was drawn from, in nats.
        agrees: Whether oracle and target hold the same token for the likeliest there.
    """

    log_likelihood: Array
    kl: Array
    agrees: NDArray[np.bool_]

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Parts in order."""
        return Scores(
            **{
                field.name: np.concatenate([getattr(p, field.name) for p in parts])
                for field in dataclasses.fields(Scores)
            }
        )


def score(session: Session, text: Text, readings: Sequence[Reading], advance: Advance) -> Scores:
    """Score a target on every sequence, each from empty caches.

    Args:
        session: The target.
        text: What it reads.
        readings: What the unquantised oracle says of each sequence.
        advance: Called with the number of tokens done each time.
    """
    parts, step = [], min(session.chunk, CALL)
    session.refuses_nonfinite = False  # they make the row's own numbers NaN
    for tokens, reading in zip(text.sequences, readings, strict=True):
        session.reset()
        # Fed a call at a time, so that no call's logits outlive their comparison.
        for low in range(0, len(tokens), step):
            # The runtime may take a call in two, where a ring ends within it.
            for logits in session.feed(tokens[low : low + step], wanted="all"):
                first = session.position - len(logits)
                rows = torch.from_numpy(np.ascontiguousarray(logits))
                parts += _score_call(rows, tokens[first + 1 : first + 1 + len(rows)], reading.logits, first)
                advance(len(rows))
                del logits, rows
    return Scores.join(parts)


def score_oracle(text: Text, readings: Sequence[Reading], advance: Advance) -> Array:
    """Log probability of every scored token by the oracle itself, [N]."""
    parts = []
    for tokens, reading in zip(text.sequences, readings, strict=True):
        for low in range(0, len(tokens) - 1, ROWS):
            following = tokens[low + 1 : low + 1 + ROWS]
            log_p = reading.logits(low, low + len(following)).log_softmax(-1)
            parts.append(_taken(log_p, following))
            advance(len(following))
    return np.concatenate(parts)


def _score_call(logits: torch.Tensor, following: Sequence[int], expected: Logits, first: int) -> list[Scores]:
    """Score the rows that a token follows; the last one of a sequence predicts nothing that is known."""
    parts = []
    for low in range(0, len(following), ROWS):
        tokens = following[low : low + ROWS]
        rows, beside = logits[low : low + len(tokens)], expected(first + low, first + low + len(tokens))
        log_q = rows.log_softmax(-1)
        parts.append(
            Scores(
                log_likelihood=_taken(log_q, tokens),
                kl=kl(beside.log_softmax(-1), log_q),
                agrees=(rows.argmax(-1) == beside.argmax(-1)).numpy(),
            )
        )
    return parts


def _taken(log_p: torch.Tensor, tokens: Sequence[int]) -> Array:
    return np.asarray(log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0].double().numpy())
