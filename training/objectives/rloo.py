"""REINFORCE leave-one-out (arXiv 2402.14740): a sample is worth its reward less the mean of its siblings'."""

from __future__ import annotations

import dataclasses

import torch

from transom.training.loop import Loss
from transom.training.objectives.alignment import Method, Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rloo(Method):
    """Policy gradient.

    Attributes:
        samples: Of each prompt, at least two.
        beta: Weight of KL(policy || anchor), in rewards a nat.
    """

    samples: int = 4
    beta: float = 0.02

    @property
    def own(self) -> int:
        """Samples of the policy."""
        return self.samples

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """A loss whose gradient is the policy gradient's."""
        assert own is not None
        worth_Pn = own.rewards - self.beta * own.log_ratios.detach()
        return Loss(value=-(leave_one_out(worth_Pn) * own.log_probs).mean())


def leave_one_out(worth: torch.Tensor) -> torch.Tensor:
    """Each value less the mean of the others along the last axis; a value that is alone stays."""
    others = max(1, worth.shape[-1] - 1)
    return worth - (worth.sum(-1, keepdim=True) - worth) / others


METHOD = Rloo
