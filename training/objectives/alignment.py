"""Alignment as an objective: samples of the policy and of an anchor, their rewards, and what a method makes of them.

Axes: P prompts, n samples a prompt, k of them that log p is known of, T tokens.
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
        log_probs: log p of whole continuations under the policy, float32 [P, k], in nats, with a gradient: of those
            that the method chose, in its order.
        anchor_log_probs: The same under the anchor, without a gradient; None if the method does not read it.
        rewards: float32 [P, n].
        lengths: Tokens of the continuations, [P, n].
    """

    log_probs: torch.Tensor
    anchor_log_probs: torch.Tensor | None
    rewards: torch.Tensor
    lengths: torch.Tensor

    @property
    def log_ratios(self) -> torch.Tensor:
        """log(policy / anchor), float32 [P, k], with the policy's gradient."""
        assert self.anchor_log_probs is not None, "a method that reads this says so by `compares`"
        return self.log_probs - self.anchor_log_probs


class Method(abc.ABC):
    """What is learned from samples, and what it reads of them: nothing else is computed."""

    @property
    def own(self) -> int:
        """Samples of the policy that a prompt needs. Of all of them log p is known, under both models."""
        return 0

    @property
    def anchored(self) -> int:
        """Samples of the anchor that a prompt needs."""
        return 0

    @property
    def compares(self) -> bool:
        """Whether it reads the anchor's log p of the anchor's samples too."""
        return False

    def chosen(self, rewards_Pn: torch.Tensor) -> torch.Tensor:
        """The anchor's samples that it reads log p of, as places, int64 [P, k]; all of them by default."""
        return all_places(rewards_Pn)

    @abc.abstractmethod
    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """The loss of a few prompts; samples are None where none are needed."""


def all_places(rewards_Pn: torch.Tensor) -> torch.Tensor:
    """The places of all samples, [P, n]."""
    return torch.arange(rewards_Pn.shape[1]).expand(rewards_Pn.shape)


def best(rewards_Pn: torch.Tensor) -> torch.Tensor:
    """The place of the best sample, [P, 1]. Of equal ones the first counts, which is any of them."""
    return rewards_Pn.argmax(1, keepdim=True)


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


class Anchored(Objective):
    """A policy, an anchor that may follow it, and a method that learns from continuations.

    Args:
        policy: What is trained.
        anchor: Where it is kept near to: the policy's own start, with weights of its own. None if nothing reads it.
        method: What is learned.
        parts: In how many parts a step's prompts go through the model.
        anchor_rate: Share of the policy that the anchor moves by after every step; 0 for an anchor that stays.
    """

    def __init__(
        self, policy: Policy, anchor: Policy | None, method: Method, *, parts: int, anchor_rate: float
    ) -> None:
        self.parameters, self.parts = policy.parameters, parts
        self._policy, self._anchor, self._method, self._anchor_rate = policy, anchor, method, anchor_rate

    def _samples(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[int]],
        rewards_Pn: torch.Tensor,
        *,
        own: bool = False,
    ) -> Samples:
        """What a method reads of continuations.

        Args:
            prompts: P times n, those of one prompt together.
            continuations: Of each.
            rewards_Pn: Their rewards.
            own: Whether they are the policy's own.
        """
        places_Pk = all_places(rewards_Pn) if own else self._method.chosen(rewards_Pn)
        count, copies = rewards_Pn.shape
        rows = (torch.arange(count)[:, None] * copies + places_Pk).flatten().tolist()
        tokens_BT, counts_BT = continued([prompts[row] for row in rows], [continuations[row] for row in rows])

        def log_probs(model: Policy) -> torch.Tensor:
            return model.log_probs(tokens_BT, counts_BT).cpu().sum(-1).view(places_Pk.shape)

        anchor_log_probs = None
        if own or self._method.compares:
            assert self._anchor is not None
            with torch.no_grad():
                anchor_log_probs = log_probs(self._anchor)
        return Samples(
            log_probs=log_probs(self._policy),
            anchor_log_probs=anchor_log_probs,
            rewards=rewards_Pn,
            lengths=torch.tensor(list(map(len, continuations))).view(rewards_Pn.shape),
        )

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the anchor."""
        if self._anchor_rate and self._anchor is not None:
            for name, weight in self._anchor.weights.items():
                weight.lerp_(self._policy.weights[name].detach(), self._anchor_rate)

    def state(self) -> dict[str, Any]:
        """The anchor, if it moves."""
        return {"anchor": self._anchor.weights} if self._anchor_rate and self._anchor is not None else {}

    @torch.no_grad()
    def resume(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        for name, weight in state.get("anchor", {}).items():
            assert self._anchor is not None
            self._anchor.weights[name].copy_(weight)


class Alignment(Anchored):
    """Learn from samples of the policy and of the anchor.

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
        super().__init__(policy, anchor, method, parts=parts, anchor_rate=anchor_rate)
        self._source, self._prompts = anchor, prompts
        self._score, self._decode, self._stops, self._batch = score, decode, stops, batch
        self._max_new, self._temperature, self._seed = max_new, temperature, seed

    def losses(self, step: int) -> Iterator[Loss]:
        """The method's loss of each part of a step's prompts, with the mean reward."""
        size = self._batch // self.parts
        for part in range(step * self.parts, (step + 1) * self.parts):
            places = range(part * size, (part + 1) * size)
            prompts = [self._prompts[index_at(place, len(self._prompts), self._seed)] for place in places]
            generator = generator_at(part, self._seed)
            own = self._drawn(self._policy, prompts, self._method.own, generator)
            anchored = self._drawn(self._source, prompts, self._method.anchored, generator)
            loss = self._method.loss(own, anchored)
            metrics = dict(loss.metrics)
            for name, samples in (("reward", own), ("anchor_reward", anchored)):
                if samples is not None:
                    metrics[name] = float(samples.rewards.mean())
                    metrics[f"{name}_length"] = float(samples.lengths.float().mean())
            if own is not None:
                metrics["kl_to_anchor"] = float(own.log_ratios.detach().mean())
            yield dataclasses.replace(loss, metrics=metrics)

    def _drawn(
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
        rewards_Pn = torch.tensor(self._score(repeated, texts)).view(len(prompts), copies)
        return self._samples(repeated, continuations, rewards_Pn, own=source is self._policy)
