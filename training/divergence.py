"""Distillation losses: what a student's next-token probabilities q lose against a teacher's p, without all logits.

Logits are computed from hidden states for a few positions at a time, and only their part of the gradient is kept:
memory is a few rows of the vocabulary, however many positions there are.

The Gemma 3 report samples 256 logits of the teacher a token, weighted by their probability, zeroes the rest and
renormalises (section 2.2). It does not say whether it samples with replacement, nor what the weights are afterwards, so
every reading is here; see `READINGS`.

Axes: N positions, V vocabulary, D model width, M draws, U distinct tokens.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch

LOGITS = 2**24
"""Logits computed at a time: 64 MiB of float32."""

READINGS = {
    "counts": "draws with replacement, each token as often as it was drawn: an unbiased estimate (arXiv 2503.16870)",
    "renorm": "draws with replacement; the drawn tokens keep their probabilities, renormalised",
    "renorm_wor": "draws without replacement; the drawn tokens keep their probabilities, renormalised",
    "top_k": "the likeliest tokens, renormalised",
}
"""How a few tokens stand for a teacher's distribution."""


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

    @property
    def step(self) -> int:
        """Positions whose logits are computed at a time."""
        return max(1, LOGITS // self.table.shape[0])


class Targets(abc.ABC):
    """What the student should say of N positions."""

    @abc.abstractmethod
    def differentiate(self, log_q_NV: torch.Tensor, q_NV: torch.Tensor, first: int) -> torch.Tensor:
        """Turn q in place into the gradient of the loss for the student's logits, for positions from `first` on.

        Returns:
            The loss of every position, in nats.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Targets):
    """The whole distribution of a teacher.

    Attributes:
        hidden: Its last hidden states, float32 [N, D].
        head: Its head.
        forward: Share of KL(p || q) in the loss; the rest is KL(q || p).
    """

    hidden: torch.Tensor
    head: Head
    forward: float = 1.0

    def differentiate(self, log_q_NV: torch.Tensor, q_NV: torch.Tensor, first: int) -> torch.Tensor:
        """See the class above."""
        log_p_NV = self.head.logits(self.hidden[first : first + len(q_NV)]).log_softmax(-1)
        p_NV = log_p_NV.exp()
        if self.forward == 1:
            q_NV.sub_(p_NV)
            return log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(-1)
        ratio_NV = log_q_NV - log_p_NV
        reverse_N = (q_NV * ratio_NV).sum(-1)
        forward_N = -(p_NV * ratio_NV).sum(-1)
        gradient_NV = self.forward * (q_NV - p_NV) + (1 - self.forward) * q_NV * (ratio_NV - reverse_N[:, None])
        q_NV.copy_(gradient_NV)
        return self.forward * forward_N + (1 - self.forward) * reverse_N


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Targets):
    """A few tokens that stand for a teacher's distribution; the loss is KL(targets || q).

    Attributes:
        ids: int64 [N, U], distinct in a row where their share is not zero.
        shares: float32 [N, U], of sum 1 in a row.
    """

    ids: torch.Tensor
    shares: torch.Tensor

    @staticmethod
    def draw(
        hidden: torch.Tensor, head: Head, count: int, generator: torch.Generator | None, reading: str = "counts"
    ) -> Sparse:
        """Tokens of a teacher.

        Args:
            hidden: Its last hidden states, float32 [N, D].
            head: Its head.
            count: Draws, or tokens kept, a position.
            generator: Of the draws.
            reading: Of `READINGS`.
        """
        blocks = []
        for low in range(0, len(hidden), head.step):
            p_NV = head.logits(hidden[low : low + head.step]).softmax(-1)
            if reading == "top_k":
                shares_NM, ids_NM = p_NV.topk(min(count, p_NV.shape[1]))
            else:
                most = min(count, p_NV.shape[1]) if reading == "renorm_wor" else count
                ids_NM = p_NV.multinomial(most, replacement=reading != "renorm_wor", generator=generator)
                ids_NM, counts_NM = _distinct(ids_NM)
                shares_NM = counts_NM if reading == "counts" else p_NV.gather(1, ids_NM) * (counts_NM > 0)
            blocks.append((ids_NM, shares_NM / shares_NM.sum(-1, keepdim=True)))
        widest = max(ids.shape[1] for ids, _ in blocks)
        ids, shares = (
            torch.cat([torch.nn.functional.pad(part, (0, widest - part.shape[1])) for part in parts])
            for parts in zip(*blocks, strict=True)
        )
        return Sparse(ids=ids, shares=shares)

    def differentiate(self, log_q_NV: torch.Tensor, q_NV: torch.Tensor, first: int) -> torch.Tensor:
        """See the class above."""
        ids_NU, shares_NU = (part[first : first + len(q_NV)] for part in (self.ids, self.shares))
        q_NV.scatter_add_(1, ids_NU, -shares_NU)
        entropy_N: torch.Tensor = torch.special.entr(shares_NU).sum(-1)
        return -entropy_N - (log_q_NV.gather(1, ids_NU) * shares_NU).sum(-1)


def _distinct(ids_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids without repetition [N, U], and how often each was there; places past the last one have id 0 and count 0."""
    ordered_NM = ids_NM.sort(-1).values
    begins_NM = torch.ones_like(ordered_NM)
    begins_NM[:, 1:] = (ordered_NM[:, 1:] != ordered_NM[:, :-1]).long()
    places_NM = begins_NM.cumsum(-1) - 1
    width = int(places_NM.max()) + 1
    empty = ordered_NM.new_zeros(len(ids_NM), width)
    counts_NU = empty.float().scatter_add_(1, places_NM, torch.ones(ids_NM.shape, device=ids_NM.device))
    return empty.scatter_(1, places_NM, ordered_NM), counts_NU


class _Loss(torch.autograd.Function):
    """Mean loss over positions; the gradients are computed along with it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, table: torch.Tensor, head: Head, targets: Targets) -> torch.Tensor:
        gradient_ND, losses = torch.empty_like(hidden), []
        gradient_VD = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        for low in range(0, len(hidden), head.step):
            hidden_ND = hidden[low : low + head.step]
            log_q_NV = head.logits(hidden_ND)
            slope_NV = None if head.softcap is None else 1 - (log_q_NV / head.softcap).square_()
            log_q_NV = log_q_NV.log_softmax(-1)
            gradient_NV = log_q_NV.exp()
            losses.append(targets.differentiate(log_q_NV, gradient_NV, low))
            if slope_NV is not None:
                gradient_NV.mul_(slope_NV)
            gradient_NV = gradient_NV.div_(len(hidden)).to(table.dtype)
            gradient_ND[low : low + head.step] = gradient_NV @ table
            if gradient_VD is not None:
                gradient_VD.addmm_(gradient_NV.T, hidden_ND.to(table.dtype))
        ctx.save_for_backward(gradient_ND, gradient_VD)
        return torch.cat(losses).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        gradient_ND, gradient_VD = ctx.saved_tensors
        return gradient_ND * gradients[0], None if gradient_VD is None else gradient_VD * gradients[0], None, None


def distillation_loss(hidden: torch.Tensor, head: Head, targets: Targets) -> torch.Tensor:
    """Mean loss in nats, a scalar with a gradient for the hidden states, and for the table if it takes one.

    Args:
        hidden: The student's last hidden states, float32 [N, D].
        head: The student's head.
        targets: What it should say of the same positions.
    """
    loss: torch.Tensor = _Loss.apply(hidden, head.table, head, targets)  # type: ignore[no-untyped-call]
    return loss
