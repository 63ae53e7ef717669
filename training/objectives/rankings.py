"""Rankings by people as an objective: methods that learn from an anchor's samples, given a file's responses instead.

No reward is needed and nothing is sampled: the first response of a prompt is the best, the last the worst. What the
anchor is to a method stays: the start, which DPO compares with, or a moving average of the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from transom.errors import TrainingError
from transom.training.loop import Loss
from transom.training.objectives.alignment import Anchored, Method
from transom.training.policy import Policy
from transom.training.prompts import Prompt, response_ids
from transom.training.text import index_at
from transom.zoo.tokenizer import Tokenizer

CHOSEN, REJECTED, RANKED = "chosen", "rejected", "ranked"
"""Keys of a line: the two responses of a pair, or a list of responses, the best first."""


def ranked_ids(tokenizer: Tokenizer, prompts: Sequence[Prompt], longest: int) -> list[list[list[int]]]:
    """Token ids of every prompt's responses, the best first, each with the token that ends a text.

    Raises:
        TrainingError: If a line has neither a pair nor a ranking, or both, or a response is longer than `longest`.
    """
    return [[response_ids(tokenizer, prompt, text, longest) for text in _responses(prompt)] for prompt in prompts]


def _responses(prompt: Prompt) -> list[str]:
    data = prompt.reference
    keys = [key for key in (CHOSEN, REJECTED, RANKED) if key in data]
    texts: list[str]
    if keys == [RANKED]:
        ranked = data[RANKED]
        if not isinstance(ranked, list) or len(ranked) < 2:
            raise TrainingError(f"{prompt.where}: `{RANKED}` is no list of two or more texts, the best first")
        texts = ranked
    elif keys == [CHOSEN, REJECTED]:
        texts = [data[CHOSEN], data[REJECTED]]
    else:
        there = ", ".join(f"`{key}`" for key in keys) or "none of them"
        raise TrainingError(
            f"{prompt.where} has {there}: give every line `{CHOSEN}` and `{REJECTED}`, or `{RANKED}` alone"
        )
    if not all(isinstance(text, str) for text in texts):
        raise TrainingError(f"{prompt.where}: a response is no text: write texts under {', '.join(keys)}")
    return texts


class Rankings(Anchored):
    """Learn rankings.

    Args:
        policy: What is trained.
        anchor: Its start, with weights of its own; None if the method does not compare with it.
        method: What is learned of rankings.
        prompts: Each with its responses.
        responses: Token ids of their responses, the best first, two or more of a prompt.
        batch: Prompts in a step.
        parts: In how many parts they go through the model; it divides `batch`.
        anchor_rate: Share of the policy that the anchor moves by after every step; 0 for an anchor that stays.
        seed: Of their order.
    """

    def __init__(
        self,
        policy: Policy,
        anchor: Policy | None,
        method: Method,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Sequence[int]]],
        *,
        batch: int,
        parts: int = 1,
        anchor_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(policy, anchor, method, parts=parts, anchor_rate=anchor_rate)
        self._prompts, self._responses, self._batch, self._seed = prompts, responses, batch, seed

    def losses(self, step: int) -> Iterator[Loss]:
        """The method's loss of each part of a step: the mean over prompts, however many responses each has."""
        size = self._batch // self.parts
        for part in range(step * self.parts, (step + 1) * self.parts):
            places = range(part * size, (part + 1) * size)
            groups: dict[int, list[int]] = {}
            for index in (index_at(place, len(self._prompts), self._seed) for place in places):
                groups.setdefault(len(self._responses[index]), []).append(index)
            values, metrics = [], dict[str, float]()
            for copies, chosen in groups.items():
                loss = self._loss(chosen, copies)
                share = len(chosen) / size
                values.append(share * loss.value)
                for name, value in loss.metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + share * value
            yield Loss(value=torch.stack(values).sum(), metrics=metrics)

    def _loss(self, chosen: Sequence[int], copies: int) -> Loss:
        """Of prompts that have equally many responses."""
        prompts = [self._prompts[index] for index in chosen for _ in range(copies)]
        responses = [ids for index in chosen for ids in self._responses[index]]
        rewards_Pn = torch.arange(copies, 0, -1).float().expand(len(chosen), copies)
        return self._method.loss(None, self._samples(prompts, responses, rewards_Pn))
