"""Direct preference optimisation (arXiv 2305.18290) on pairs: the best of a prompt's samples against the worst."""

from __future__ import annotations

import dataclasses

import torch

from transom.training.loop import Loss
from transom.training.objectives.alignment import AnchorMethod, Samples, best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(AnchorMethod):
    """Learn preferences.

    Attributes:
        samples: Of the anchor, of which the best and the worst make a pair; equal rewards make none.
        beta: Of the implied reward, beta log(policy / anchor).
    """

    beta: float = 0.1

    @property
    def compares(self) -> bool:
        """The implied reward is of both models."""
        return True

    def chosen(self, rewards_Pn: torch.Tensor) -> torch.Tensor:
        """The best and the worst."""
        return torch.cat((best(rewards_Pn), best(-rewards_Pn)), 1)

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """Mean of the pairs' losses; nothing is learned where there is no pair."""
        assert anchored is not None
        best_P, worst_P = anchored.log_ratios.unbind(1)
        margin_P = best_P - worst_P
        pairs_P = (anchored.rewards.max(1).values > anchored.rewards.min(1).values).float()
        count = pairs_P.sum().clamp(min=1)
        right = float(((margin_P > 0) * pairs_P).sum() / count)
        return Loss(
            value=(dpo_losses(margin_P, self.beta) * pairs_P).sum() / count,
            metrics={"pairs": float(pairs_P.mean()), "accuracy": right},
        )


def dpo_losses(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta margin), where the margin is log(policy / anchor) of the chosen less that of the rejected."""
    return -torch.nn.functional.logsigmoid(beta * margin)


METHOD = Dpo
