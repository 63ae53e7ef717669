"""Texts with images among them, as models take them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transom.backends.prompt import Prompt
from transom.zoo.model import Model


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Tokens and images.

    Attributes:
        tokens: int64 [T]; -1 where a soft token stands.
        until: Last position that each token sees, int64 [T].
        soft: Soft tokens where they stand, zeros elsewhere, float32 [T, D].
        pixels: Of the images, float32 [n, 3, S, S].
    """

    tokens: torch.Tensor
    until: torch.Tensor
    soft: torch.Tensor
    pixels: torch.Tensor

    def prompt(self) -> Prompt:
        """What a session takes."""
        return Prompt(tokens=self.tokens.numpy(), soft=self.soft[self.tokens < 0].numpy())

    def logits(self, model: Model) -> NDArray[np.float32]:
        """What the plain module says of every position, [T, V]."""
        with torch.no_grad():
            inputs = {"until": self.until, "soft": self.soft[None]}
            rows: NDArray[np.float32] = model.eager()(self.tokens[None], torch.tensor(0), None, **inputs)[0][0].numpy()
        return rows


def sequence(model: Model, kinds: str, *, seed: int = 0) -> Sequence:
    """A sequence of texts of 3 random tokens ("t") and random images ("i")."""
    images, draw = model.config.images, torch.Generator().manual_seed(seed)
    assert images is not None
    tokens: list[int] = []
    blocks: list[tuple[int, int]] = []
    for kind in kinds:
        if kind == "t":
            tokens += torch.randint(0, model.config.vocab_size - 20, (3,), generator=draw).tolist()
            continue
        tokens.append(images.begin_id)
        blocks.append((len(tokens), len(tokens) + images.soft_tokens))
        tokens += [-1] * images.soft_tokens + [images.end_id]
    pixels = torch.rand(len(blocks), 3, images.size, images.size, generator=draw) * 2 - 1
    until, soft = torch.arange(len(tokens)), torch.zeros(len(tokens), model.config.hidden_size)
    module: Any = model.eager()
    for (first, end), image in zip(blocks, pixels, strict=True):
        until[first:end] = end - 1
        with torch.no_grad():
            soft[first:end] = module.encode_image(image[None])[0]
    return Sequence(torch.tensor(tokens), until, soft, pixels)
