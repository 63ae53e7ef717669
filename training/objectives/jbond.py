"""J-BOND (arXiv 2407.14622, section 5): Jeffreys' divergence to the best of two, with two anchor samples a prompt.

The anchor moves slowly after the policy, so the best of two of it is the best of ever more samples of the start.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from transom.training.loop import Loss
from transom.training.objectives.alignment import Method, Samples, best
from transom.training.objectives.rloo import leave_one_out

PENALTY = -math.log(16)
"""Reward of a sample that is worse than both of the anchor's (the paper's r_J; a third of them are, at first)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JBond(Method):
    """Distil the best of two, again and again.

    Attributes:
        beta: Share of the backward gradient.
        gamma: Weight of KL(policy || anchor).
    """

    beta: float = 0.5
    gamma: float = 0.0

    @property
    def own(self) -> int:
        """Samples of the policy."""
        return 1

    @property
    def anchored(self) -> int:
        """Samples of the anchor."""
        return 2

    def chosen(self, rewards_Pn: torch.Tensor) -> torch.Tensor:
        """The better."""
        return best(rewards_Pn)

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """A loss whose gradient is the paper's. The baseline is the mean of the other prompts of the part."""
        assert own is not None and anchored is not None
        forward = -anchored.log_probs.mean()
        ratio_P = own.log_ratios.detach()[:, 0]
        rewards_P = jbond_rewards(own.rewards[:, 0], anchored.rewards)
        log_probs_P = own.log_probs[:, 0]
        backward = -(leave_one_out(rewards_P - ratio_P) * log_probs_P).mean()
        kl = (leave_one_out(ratio_P) * log_probs_P).mean()
        return Loss(
            value=(1 - self.beta) * forward + self.beta * backward + self.gamma * kl,
            metrics={"penalised": float((rewards_P < 0).float().mean())},
        )


def jbond_rewards(rewards_P: torch.Tensor, anchor_rewards_P2: torch.Tensor) -> torch.Tensor:
    """The penalty where a sample is worse than both of the anchor's, else nothing."""
    return torch.where(rewards_P < anchor_rewards_P2.min(1).values, PENALTY, 0.0)


METHOD = JBond
