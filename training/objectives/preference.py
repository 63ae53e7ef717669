"""Preferences of people as an objective: the pairwise loss of Bradley and Terry, for a model and the head over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from transom.training.loop import Loss, Objective
from transom.training.rewards.preference import Pair, PreferenceModel, pairwise_loss
from transom.training.text import generator_at, index_at

HEAD = "preference.head.weight"
"""Name of the head among the parameters."""


class Preferences(Objective):
    """Learn which completion of two is preferred.

    Args:
        model: What rewards.
        weights: Those of the model below the head that are trained, by name.
        pairs: What it learns.
        batch: Pairs in a step.
        parts: In how many parts they go through the model; it divides `batch`.
        dropout: Share of the hidden states that the head is not shown.
        seed: Of their order, and of what is not shown.
    """

    def __init__(
        self,
        model: PreferenceModel,
        weights: Mapping[str, torch.Tensor],
        pairs: Sequence[Pair],
        *,
        batch: int,
        parts: int = 1,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.parameters, self.parts = {**weights, HEAD: model.head.weight}, parts
        self._model, self._pairs, self._batch, self._dropout, self._seed = model, pairs, batch, dropout, seed

    def losses(self, step: int) -> Iterator[Loss]:
        """The pairwise loss of each part, and the share of its pairs that are ranked right."""
        size = self._batch // self.parts
        for part in range(step * self.parts, (step + 1) * self.parts):
            places = range(part * size, (part + 1) * size)
            pairs = [self._pairs[index_at(place, len(self._pairs), self._seed)] for place in places]
            generator = generator_at(part, self._seed)
            chosen, rejected = self._model.rewards(pairs, dropout=self._dropout, generator=generator)
            right = float((chosen > rejected).float().mean())
            yield Loss(value=pairwise_loss(chosen, rejected), metrics={"accuracy": right})
