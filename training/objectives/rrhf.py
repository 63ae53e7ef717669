"""RRHF (arXiv 2304.05302): samples are ranked by rewards, and the policy's mean log p a token should rank them so."""

from __future__ import annotations

import dataclasses

from transom.training.loop import Loss
from transom.training.objectives.alignment import AnchorMethod, Samples, best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rrhf(AnchorMethod):
    """Learn a ranking.

    Attributes:
        samples: Of the anchor.
    """

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """How far pairs in the wrong order are from the right one, and -log p of the best (equations 2 to 4)."""
        assert anchored is not None
        scores_Pn = anchored.log_probs / anchored.lengths
        worse_Pnn = anchored.rewards[:, :, None] > anchored.rewards[:, None, :]
        excess_Pnn = (scores_Pn[:, None, :] - scores_Pn[:, :, None]).clamp(min=0)
        ranking = (excess_Pnn * worse_Pnn).sum((1, 2)).mean()
        best_P1 = anchored.log_probs.gather(1, best(anchored.rewards))
        return Loss(value=ranking - best_P1.mean(), metrics={"ranking": float(ranking.detach())})


METHOD = Rrhf
