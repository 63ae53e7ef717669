"""How large a model's numbers get on a text, for `transom ranges`."""

from __future__ import annotations

from pathlib import Path

import torch

from transom.errors import ContextLengthError
from transom.export.ranges import TOKENS, OnProgress, Ranges, trace_ranges
from transom.zoo.model import Model
from transom.zoo.prompt import make_prompt

HALF = torch.float16
"""A trace in this dtype tells which values follow the graph's dtype; the others the model keeps in float32 itself."""


def ranges_of(
    model: Model,
    *,
    text: Path | None = None,
    tokens: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Ranges:
    """Trace ranges on a text: `ranges.overflowing(float_format("float16"))` tells what leaves float16's range.

    The model's weights are read into memory; it computes in float32. It reads the shipped text by default, 1,024
    tokens or the context if that is shorter; a shorter text is repeated.

    Raises:
        ContextLengthError: If these are more tokens than the model's context holds.
        TokenizerError: If the file cannot be read or holds no text, or the model has no tokenizer for it.
    """
    length = min(TOKENS, model.config.context) if tokens is None else tokens
    if length > model.config.context:
        raise ContextLengthError(
            f"{length} tokens do not fit into {model.config.name}'s context of {model.config.context}: ask for fewer"
        )
    prompt = make_prompt(model, length, text, seed)
    for done, dtype in enumerate((torch.float32, HALF)):
        on_progress("trace", done, 2)
        model.trace(dtype=dtype)
    on_progress("trace", 2, 2)
    return trace_ranges(model, prompt.ids, half=model.trace(dtype=HALF), on_progress=on_progress)
