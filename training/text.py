"""Text as token sequences for calibration and training."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from transom.errors import TokenizerError
from transom.zoo.model import Model
from transom.zoo.prompt import read_words


def read_sequences(model: Model, path: Path, length: int) -> torch.Tensor:
    """Cut a text into sequences that each begin with the model's first token.

    Args:
        model: Whose tokenizer reads it.
        path: UTF-8 text.
        length: Tokens of a sequence, at least two.

    Returns:
        int64 [N, length]; what is left at the end of the text is dropped.

    Raises:
        TokenizerError: If the model has no tokenizer, or the text cannot be read or is too short.
    """
    if model.tokenizer is None:
        raise TokenizerError(f"{model.config.name} has no tokenizer, so it cannot read {path}: give a source that has")
    if not 2 <= length <= model.config.context:
        raise TokenizerError(f"sequences of {length} tokens: choose a length from 2 to {model.config.context}")
    ids = model.tokenizer.encode(read_words(path), bos=False)
    first = [] if model.tokenizer.first_id is None else [model.tokenizer.first_id]
    step = length - len(first)
    count = len(ids) // step
    if count == 0:
        raise TokenizerError(f"{path} has {len(ids)} tokens, one sequence needs {step}: give more text or a --length")
    body = torch.tensor(ids[: count * step]).view(count, step)
    return torch.cat((torch.tensor(first, dtype=torch.int64).expand(count, -1), body), 1)


def index_at(place: int, count: int, seed: int) -> int:
    """Which of `count` sequences comes at a place of a run: each comes once before any comes again."""
    epoch, offset = divmod(place, count)
    return int(order(count, seed + epoch)[offset])


# A step asks for the same order once for each of its sequences.
@functools.lru_cache(maxsize=4)
def order(count: int, seed: int) -> torch.Tensor:
    """The numbers below `count` in an order that the seed alone decides; all callers get one tensor."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def generator_at(place: int, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Draws at a place of a run depend on the place and the seed alone, so a run that goes on draws the same."""
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
