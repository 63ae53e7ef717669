"""BOND (arXiv 2407.14622): the policy becomes the distribution of the best of n samples of its anchor.

Of an anchor pi and a reward with quantiles p< (a sample is worse) and p<= (worse or equal), the best of n has
pi_bon(y) = pi(y) p<=^(n-1) sum_{i=1..n} (p< / p<=)^(i-1). Its logarithm over pi is, but for a constant, a reward of its
own, so the divergence to it can be taken either way: forward, on the best samples; backward, as a policy gradient.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from transom.training.loop import Loss
from transom.training.objectives.alignment import Method, Samples, best
from transom.training.objectives.rloo import leave_one_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bond(Method):
    """Distil the best of n.

    Attributes:
        n: Of how many samples the best is distilled.
        samples: Of the anchor, which quantiles are estimated from; at least `n`.
        beta: Share of the backward divergence; 0 is forward, 1 backward, 0.5 Jeffreys.
    """

    n: int = 4
    samples: int = 4
    beta: float = 0.5

    @property
    def own(self) -> int:
        """Samples of the policy, for the backward divergence: two, so that each is the other's baseline."""
        return 2 if self.beta else 0

    @property
    def anchored(self) -> int:
        """Samples of the anchor."""
        return max(self.samples, self.n)

    def chosen(self, rewards_Pn: torch.Tensor) -> torch.Tensor:
        """The best of the first n."""
        return best(rewards_Pn[:, : self.n])

    def loss(self, own: Samples | None, anchored: Samples | None) -> Loss:
        """(1 - beta) KL(best of n || policy) + beta KL(policy || best of n), but for constants."""
        assert anchored is not None
        forward = -anchored.log_probs.mean()
        if own is None:
            return Loss(value=forward)
        # A quantile of zero has no logarithm: a sample that is worse than all of the anchor's stands between none and
        # one of them.
        smallest = 0.5 / anchored.rewards.shape[1]
        worse, equal = quantiles(own.rewards, anchored.rewards)
        best_P2 = log_best_of_n(worse, (worse + equal).clamp(min=smallest), self.n)
        worth_P2 = best_P2 - own.log_ratios.detach()
        backward = -(leave_one_out(worth_P2) * own.log_probs).mean()
        return Loss(value=(1 - self.beta) * forward + self.beta * backward)


def quantiles(rewards_Pm: torch.Tensor, anchor_rewards_Pn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of the anchor's samples that are worse than each of m rewards, and that equal it, both [P, m]."""
    worse = (anchor_rewards_Pn[:, None, :] < rewards_Pm[:, :, None]).float().mean(-1)
    equal = (anchor_rewards_Pn[:, None, :] == rewards_Pm[:, :, None]).float().mean(-1)
    return worse, equal


def log_best_of_n(worse: torch.Tensor, worse_or_equal: torch.Tensor, n: int) -> torch.Tensor:
    """log(pi_bon / pi) of samples by their quantiles, element by element.

    Args:
        worse: p<, the probability that a sample of the anchor is worse.
        worse_or_equal: p<=, positive.
        n: Of how many samples the best is taken.
    """
    ratio = worse / worse_or_equal
    powers = torch.stack([ratio**power for power in range(n)]).sum(0)
    return (n - 1) * worse_or_equal.log() + powers.log()


def best_of_n(probabilities: torch.Tensor, rewards: torch.Tensor, n: int) -> torch.Tensor:
    """The distribution of the best of n draws, of a policy over a few outcomes, [K].

    Draws of equal reward are chosen among evenly.
    """
    worse = ((rewards[None, :] < rewards[:, None]) * probabilities[None, :]).sum(-1)
    worse_or_equal = ((rewards[None, :] <= rewards[:, None]) * probabilities[None, :]).sum(-1)
    return probabilities * log_best_of_n(worse, worse_or_equal, n).exp()


def most_divergence(n: int) -> float:
    """Upper bound of KL(best of n || anchor) in nats: log n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


METHOD = Bond
