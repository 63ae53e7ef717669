"""Best of n: cross-entropy on the best of n samples of the anchor (also called RAFT, arXiv 2304.06767)."""

from __future__ import annotations

import dataclasses

from transom.training.loop import Loss
from transom.training.objectives.alignment import AnchorMethod, Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN(AnchorMethod):
    """Learn the best sample.

    Attributes:
        samples: n.
    """

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """Mean -log p of the best samples, in nats. Of equal ones the first counts, which is any of them."""
        assert anchored is not None
        best_P1 = anchored.rewards.argmax(1, keepdim=True)
        return Loss(
            value=-anchored.log_probs.gather(1, best_P1).mean(),
            metrics={"best_reward": float(anchored.rewards.max(1).values.mean())},
        )


METHOD = BestOfN
