"""Distillation: what a student's next-token probabilities lose against a teacher's, without holding all logits.

Logits are computed from hidden states for a few positions at a time, and only their part of the gradient is kept:
memory is a few rows of the vocabulary, however many positions there are.

Targets are the teacher's whole distribution, or 256 samples of it, as the Gemma 3 report distils (section 2.2). It
does not say how it samples; counts of draws with replacement estimate the distribution without bias (arXiv 2503.16870).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch

LOGITS = 2**24
"""Logits computed at a time: 64 MiB of float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """How hidden states become logits.

    Attributes:
        table: [V, D]. In bfloat16, products are of bfloat16 and logits have 8 bits: three times as fast on CPUs that
            have such products, and the noise is far below what 4-bit weights cost.
        softcap: `cap * tanh(logits / cap)`, or None.
    """

    table: torch.Tensor
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, V]."""
        logits = torch.nn.functional.linear(hidden.to(self.table.dtype), self.table).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class Targets(abc.ABC):
    """What the student should say of N positions."""

    @abc.abstractmethod
    def subtract_from(self, log_q_NV: torch.Tensor, q_NV: torch.Tensor, first: int) -> torch.Tensor:
        """Take the target's probabilities p from q in place, for positions from `first` on.

        Returns:
            KL(p || q) of every position, in nats.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Targets):
    """The whole distribution of a teacher.

    Attributes:
        hidden: Its last hidden states, float32 [N, D].
        head: Its head.
    """

    hidden: torch.Tensor
    head: Head

    def subtract_from(self, log_q_NV: torch.Tensor, q_NV: torch.Tensor, first: int) -> torch.Tensor:
        """See the class above."""
        log_p_NV = self.head.logits(self.hidden[first : first + len(q_NV)]).log_softmax(-1)
        p_NV = log_p_NV.exp()
        q_NV.sub_(p_NV)
        kl_N: torch.Tensor = log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(-1)
        return kl_N


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Targets):
    """Draws from a teacher's distribution: ids with the share of the draws that fell on each.

    Attributes:
        ids: int64 [N, M]; repeated ids are several draws.
    """

    ids: torch.Tensor

    @staticmethod
    def draw(hidden: torch.Tensor, head: Head, samples: int, generator: torch.Generator | None) -> Sampled:
        """Draw with replacement."""
        step = max(1, LOGITS // head.table.shape[0])
        parts = [
            torch.multinomial(
                head.logits(hidden[low : low + step]).softmax(-1), samples, replacement=True, generator=generator
            )
            for low in range(0, len(hidden), step)
        ]
        return Sampled(ids=torch.cat(parts))

    def subtract_from(self, log_q_NV: torch.Tensor, q_NV: torch.Tensor, first: int) -> torch.Tensor:
        """See the class above."""
        ids_NM = self.ids[first : first + len(q_NV)]
        share = torch.full(ids_NM.shape, 1 / ids_NM.shape[1], dtype=q_NV.dtype, device=q_NV.device)
        p_NV = torch.zeros_like(q_NV).scatter_add_(1, ids_NM, share)
        q_NV.sub_(p_NV)
        entropy_N = torch.special.entr(p_NV).sum(-1)
        kl_N: torch.Tensor = -entropy_N - log_q_NV.gather(1, ids_NM).mean(-1)
        return kl_N


class _Loss(torch.autograd.Function):
    """Mean KL over positions; the gradient is computed along with it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, targets: Targets) -> torch.Tensor:
        step = max(1, LOGITS // head.table.shape[0])
        gradient_ND, kls = torch.empty_like(hidden), []
        for low in range(0, len(hidden), step):
            log_q_NV = head.logits(hidden[low : low + step])
            slope_NV = None if head.softcap is None else 1 - (log_q_NV / head.softcap).square_()
            log_q_NV = log_q_NV.log_softmax(-1)
            difference_NV = log_q_NV.exp()
            kls.append(targets.subtract_from(log_q_NV, difference_NV, low))
            if slope_NV is not None:
                difference_NV.mul_(slope_NV)
            gradient_ND[low : low + step] = difference_NV.to(head.table.dtype) @ head.table
        ctx.save_for_backward(gradient_ND.div_(len(hidden)))
        return torch.cat(kls).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0], None, None


def distillation_loss(hidden: torch.Tensor, head: Head, targets: Targets) -> torch.Tensor:
    """Mean KL(targets || student) in nats, a scalar with a gradient for the hidden states (the head is frozen).

    Args:
        hidden: The student's last hidden states, float32 [N, D].
        head: The student's head.
        targets: What it should say of the same positions.
    """
    loss: torch.Tensor = _Loss.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss
