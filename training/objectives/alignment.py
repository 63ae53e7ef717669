"""Alignment as an objective: samples of the policy and of an anchor, their rewards, and what a method makes of them.

Axes: P prompts, n samples a prompt, T tokens.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from transom.training.loop import Loss, Objective
from transom.training.policy import Policy
from transom.training.prompts import Prompt, continued
from transom.training.text import generator_at, index_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Continuations of P prompts, n of each.

    Attributes:
        log_probs: log p of whole continuations under the policy, float32 [P, n], in nats, with a gradient.
        anchor_log_probs: The same under the anchor, without one.
        rewards: float32 [P, n].
        lengths: Tokens of the continuations, [P, n].
    """

    log_probs: torch.Tensor
    anchor_log_probs: torch.Tensor
    rewards: torch.Tensor
    lengths: torch.Tensor


class Method(abc.ABC):
    """What is learned from samples."""

    @property
    def own(self) -> int:
        """Samples of the policy that a prompt needs."""
        return 0

    @property
    def anchored(self) -> int:
        """Samples of the anchor that a prompt needs."""
        return 0

    @abc.abstractmethod
    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """The loss of a few prompts; samples are None where none are needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorMethod(Method):
    """A method that learns from the anchor's samples alone.

    Attributes:
        samples: Of each prompt.
    """

    samples: int = 4

    @property
    def anchored(self) -> int:
        """Samples of the anchor."""
        return self.samples


Score = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""Rewards of continuations, each with its prompt."""


class Alignment(Objective):
    """A policy and its anchor.

    Args:
        policy: What is trained.
        anchor: Where it is kept near to; the policy's own start, with weights of its own.
        method: What is learned.
        prompts: What is continued.
        score: The reward.
        decode: Token ids to text.
        stops: Tokens that end a continuation.
        batch: Prompts in a step.
        parts: In how many parts they go through the model; it divides `batch`. A method compares within a part.
        max_new: Most tokens of a continuation.
        temperature: Of sampling.
        anchor_rate: Share of the policy that the anchor moves by after every step; 0 for an anchor that stays.
        seed: Of the order of prompts, and of draws.
    """

    def __init__(
        self,
        policy: Policy,
        anchor: Policy,
        method: Method,
        prompts: Sequence[Prompt],
        score: Score,
        *,
        decode: Callable[[Sequence[int]], str],
        stops: frozenset[int],
        batch: int,
        parts: int = 1,
        max_new: int,
        temperature: float = 1.0,
        anchor_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.parameters, self.parts = policy.parameters, parts
        self._policy, self._anchor, self._method, self._prompts = policy, anchor, method, prompts
        self._score, self._decode, self._stops, self._batch = score, decode, stops, batch
        self._max_new, self._temperature, self._anchor_rate, self._seed = max_new, temperature, anchor_rate, seed

    def losses(self, step: int) -> Iterator[Loss]:
        """The method's loss of each part of a step's prompts, with the mean reward."""
        size = self._batch // self.parts
        for part in range(step * self.parts, (step + 1) * self.parts):
            places = range(part * size, (part + 1) * size)
            prompts = [self._prompts[index_at(place, len(self._prompts), self._seed)] for place in places]
            generator = generator_at(part, self._seed)
            own = self._samples(self._policy, prompts, self._method.own, generator)
            anchored = self._samples(self._anchor, prompts, self._method.anchored, generator)
            loss = self._method.loss(own, anchored)
            metrics = dict(loss.metrics)
            for name, samples in (("reward", own), ("anchor_reward", anchored)):
                if samples is not None:
                    metrics[name] = float(samples.rewards.mean())
                    metrics[f"{name}_length"] = float(samples.lengths.float().mean())
            if own is not None:
                metrics["kl_to_anchor"] = float((own.log_probs.detach() - own.anchor_log_probs).mean())
            yield dataclasses.replace(loss, metrics=metrics)

    def _samples(
        self, source: Policy, prompts: Sequence[Prompt], copies: int, generator: torch.Generator
    ) -> Samples | None:
        if copies == 0:
            return None
        repeated = [prompt for prompt in prompts for _ in range(copies)]
        continuations = source.sample(
            [prompt.ids for prompt in repeated],
            max_new=self._max_new,
            stops=self._stops,
            temperature=self._temperature,
            generator=generator,
        )
        texts = [self._decode([id for id in new if id not in self._stops]) for new in continuations]
        rewards = torch.tensor(self._score(repeated, texts))
        tokens_BT, counts_BT = continued(repeated, continuations)
        with torch.no_grad():
            anchor_log_probs = self._anchor.log_probs(tokens_BT, counts_BT).cpu().sum(-1)
        log_probs = self._policy.log_probs(tokens_BT, counts_BT).cpu().sum(-1)
        shape = (len(prompts), copies)
        return Samples(
            log_probs=log_probs.view(shape),
            anchor_log_probs=anchor_log_probs.view(shape),
            rewards=rewards.view(shape),
            lengths=counts_BT.sum(-1).view(shape),
        )

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the anchor."""
        if self._anchor_rate:
            for name, weight in self._anchor.weights.items():
                weight.lerp_(self._policy.weights[name].detach(), self._anchor_rate)

    def state(self) -> dict[str, Any]:
        """The anchor, if it moves."""
        return {"anchor": self._anchor.weights} if self._anchor_rate else {}

    @torch.no_grad()
    def resume(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        for name, weight in state.get("anchor", {}).items():
            self._anchor.weights[name].copy_(weight)
