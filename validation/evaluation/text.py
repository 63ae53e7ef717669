"""The text that all schemes are scored on, cut into sequences that do not overlap."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from transom.errors import ContextLengthError, TokenizerError
from transom.zoo.model import Model
from transom.zoo.prompt import read_words

LENGTH = 2048
"""Tokens of a sequence, if the text and the context have as many and no other length is given."""

SHORTEST = 3
"""Two scored tokens, the fewest that have a standard error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Sequences of one length, each with <bos> in front.

    Attributes:
        available: Tokens of the whole file, <bos> included.
        sequences: Token ids. Every one but <bos> is scored, given those before it.
    """

    source: str
    available: int
    sequences: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return len(self.sequences[0])

    @property
    def scored(self) -> int:
        """Tokens whose probabilities are taken."""
        return len(self.sequences) * (self.length - 1)

    @property
    def sha256(self) -> str:
        """Identity of the ids, sequence after sequence."""
        return hashlib.sha256(np.asarray(self.sequences, dtype="<i8").tobytes()).hexdigest()


def read_sequences(model: Model, path: Path, *, length: int | None, windows: int, most: int) -> Text:
    """Read a file and cut it into `windows` sequences.

    Without a length they have as many tokens as there are, up to `LENGTH` and `most`: the shortest context of all that
    will read them.

    Raises:
        TokenizerError: If the model has no tokenizer, or the file cannot be read or is too short.
        ContextLengthError: If a sequence does not fit.
    """
    if model.tokenizer is None:
        raise TokenizerError(f"{model.config.name} has no tokenizer, so it cannot read {path}: load it with one")
    start, *rest = model.tokenizer.encode(read_words(path))
    if length is None:
        length = max(SHORTEST, min(len(rest) // windows + 1, LENGTH, most))
    if length > most:
        raise ContextLengthError(
            f"sequences of {length} tokens do not fit into a context of {most}: choose a smaller --length"
        )
    if length < SHORTEST:
        raise ContextLengthError(f"sequences of {length} tokens leave nothing to score: choose a larger --length")
    step = length - 1
    if windows * step > len(rest):
        count = f"{windows} sequences of {length} tokens" if windows > 1 else f"a sequence of {length} tokens"
        raise TokenizerError(
            f"{path} has {len(rest)} tokens, too few for {count}: give a longer text, a smaller --length or fewer "
            "--windows"
        )
    sequences = tuple((start, *rest[low * step : (low + 1) * step]) for low in range(windows))
    return Text(source=str(path), available=len(rest) + 1, sequences=sequences)
