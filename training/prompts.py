"""Prompts with what a right answer is, as JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.errors import ContextLengthError, TokenizerError, TrainingError
from transom.training.policy import padded
from transom.zoo.chat import Message
from transom.zoo.model import Model
from transom.zoo.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line.

    Attributes:
        text: What is asked.
        ids: What the model reads.
        reference: The line's other keys: what a reward or an objective knows of a right answer.
        where: File and line, for errors.
    """

    text: str
    ids: tuple[int, ...]
    reference: Mapping[str, Any]
    where: str = ""


def read_prompts(model: Model, path: Path, *, max_new: int, chat: bool = False) -> list[Prompt]:
    """Read prompts.

    Args:
        model: Whose tokenizer reads them, and whose chat template is used.
        path: A JSON object a line, with `prompt` and whatever else.
        max_new: Tokens that a continuation may take.
        chat: Whether a prompt is what a user says, in the model's chat template, and no text to be continued.

    Raises:
        TrainingError: If the file cannot be read, a line is no such object, or there is none.
        TokenizerError: If the model has no tokenizer, or no chat template that is asked for.
        ContextLengthError: If a prompt leaves too little of the context.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TokenizerError(f"{model.config.name} has no tokenizer, so it cannot read {path}: give a source that has")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read prompts from {path} ({error}): give JSON lines in UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{path}, line {number} is not JSON ({error})") from error
        text = data.pop("prompt", None) if isinstance(data, dict) else None
        if not isinstance(text, str) or not text:
            raise TrainingError(f"{path}, line {number} has no text under `prompt`: write an object a line that has")
        ids = tokenizer.encode_chat([Message(role="user", content=text)]) if chat else tokenizer.encode(text)
        if not ids:
            raise TrainingError(f"{path}, line {number}: the prompt is no tokens")
        if len(ids) + max_new > model.config.context:
            raise ContextLengthError(
                f"{path}, line {number}: {len(ids):,} tokens and {max_new:,} new ones are longer than the context of "
                f"{model.config.context:,}: shorten the prompt, or allow fewer new tokens"
            )
        prompts.append(Prompt(text=text, ids=tuple(ids), reference=data, where=f"{path}, line {number}"))
    if not prompts:
        raise TrainingError(f"{path} has no prompts: write a JSON object a line")
    return prompts


def response_ids(tokenizer: Tokenizer, prompt: Prompt, text: str, longest: int) -> list[int]:
    """Token ids of what follows a prompt, with the token that ends a text.

    Raises:
        TrainingError: If there is none, or more than `longest`.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = tokenizer.encode(text, bos=False) + end
    if not 1 <= len(ids) <= longest:
        raise TrainingError(
            f"{prompt.where}: {text[:60]!r} is {len(ids):,} tokens, 1 to {longest:,} are allowed: allow more, or leave "
            "the line out"
        )
    return ids


def continued(prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with what follows them, B of them.

    Returns:
        Tokens int64 [B, T], padded at their ends; and which of the tokens after the first belong to a continuation,
        bool [B, T - 1].
    """
    sequences = [[*prompt.ids, *new] for prompt, new in zip(prompts, continuations, strict=True)]
    tokens_BT = padded(sequences)
    places_T = torch.arange(1, tokens_BT.shape[1])
    begins, ends = (torch.tensor(x)[:, None] for x in ([len(p.ids) for p in prompts], list(map(len, sequences))))
    return tokens_BT, (places_T >= begins) & (places_T < ends)
