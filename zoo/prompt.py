"""The text that all targets read."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from transom.errors import TokenizerError
from transom.zoo.model import Model
from transom.zoo.text import read_text

SHIPPED = Path(__file__).parent / "prompt.txt"
"""Plain English prose of 2,105 Gemma tokens, written for this purpose."""

FIRST_PLAIN = 300
"""Random tokens start here, where there is room: control tokens stand at the front of a vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids and where they came from.

    Attributes:
        source: In words.
        ids: At least as many as were asked for.
    """

    source: str
    ids: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Identity of the ids."""
        return hashlib.sha256(np.asarray(self.ids, dtype="<i8").tobytes()).hexdigest()


def make_prompt(model: Model, length: int, text: Path | None, seed: int = 0) -> Prompt:
    """Real text if the model has a tokenizer, random tokens if not.

    Args:
        model: Whose vocabulary.
        length: Tokens wanted; a shorter text is repeated.
        text: File to read in place of the shipped text.
        seed: Of random tokens.

    Raises:
        TokenizerError: If the file cannot be read, holds no text, or the model has no tokenizer for it.
    """
    if model.tokenizer is None:
        if text is not None:
            raise TokenizerError(f"{model.config.name} has no tokenizer, so it cannot read {text}: leave out --text")
        low = min(FIRST_PLAIN, model.config.vocab_size // 2)
        ids = np.random.default_rng(seed).integers(low, model.config.vocab_size, length)
        return Prompt(source=f"random tokens of seed {seed}", ids=tuple(int(token) for token in ids))
    start, *rest = model.tokenizer.encode(read_words(text or SHIPPED))
    times = -(-max(length - 1, 1) // len(rest))
    source = (str(text) if text else "the shipped text") + (f", {times} times" if times > 1 else "")
    return Prompt(source=source, ids=(start, *(rest * times))[: max(length, 1)])


def read_words(path: Path) -> str:
    """A file's text, without white space around it.

    Raises:
        TokenizerError: If it cannot be read, is not UTF-8, or holds no text.
    """
    words = read_text(path).strip()
    if not words:
        raise TokenizerError(f"{path} holds no text: give a file of at least some paragraphs")
    return words
