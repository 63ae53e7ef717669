"""Direct preference optimisation (arXiv 2305.18290) on pairs of samples: the best against the worst."""

from __future__ import annotations

import dataclasses

import torch

from transom.training.loop import Loss
from transom.training.objectives.alignment import AnchorMethod, Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(AnchorMethod):
    """Learn preferences.

    Attributes:
        samples: Of the anchor, of which the best and the worst make a pair; equal rewards make none.
        beta: Of the implied reward, beta log(policy / anchor).
    """

    beta: float = 0.1

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """Mean of the pairs' losses; nothing is learned where there is no pair."""
        assert anchored is not None
        best_P1 = anchored.rewards.argmax(1, keepdim=True)
        worst_P1 = anchored.rewards.argmin(1, keepdim=True)
        margin_Pn = anchored.log_probs - anchored.anchor_log_probs
        margin_P = (margin_Pn.gather(1, best_P1) - margin_Pn.gather(1, worst_P1))[:, 0]
        pairs_P = (anchored.rewards.max(1).values > anchored.rewards.min(1).values).float()
        losses_P = dpo_losses(margin_P, self.beta)
        return Loss(
            value=(losses_P * pairs_P).sum() / pairs_P.sum().clamp(min=1), metrics={"pairs": float(pairs_P.mean())}
        )


def dpo_losses(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta margin), where the margin is log(policy / anchor) of the chosen less that of the rejected."""
    return -torch.nn.functional.logsigmoid(beta * margin)


METHOD = Dpo
