"""Best of n: cross-entropy on the best of n samples of the anchor (also called RAFT, arXiv 2304.06767)."""

from __future__ import annotations

import dataclasses

import torch

from transom.training.loop import Loss
from transom.training.objectives.alignment import AnchorMethod, Samples, best


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(AnchorMethod):
    """Learn the best sample.

    Attributes:
        samples: n.
    """

    def chosen(self, rewards_Pn: torch.Tensor) -> torch.Tensor:
        """The best."""
        return best(rewards_Pn)

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """Mean -log p of the best samples, in nats."""
        assert anchored is not None
        return Loss(
            value=-anchored.log_probs.mean(),
            metrics={"best_reward": float(anchored.rewards.max(1).values.mean())},
        )


METHOD = BestOfN
