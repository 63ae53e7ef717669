"""Distillation: losses and gradients against autograd over all logits, and what sampling costs."""

from __future__ import annotations

import pytest
import torch

from transom.training import distill
from transom.training.distill import Full, Head, Sampled, distillation_loss


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 4, 100], ids=lambda rows: f"{rows} rows at a time")
def test_against_autograd(rows: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, width, positions = 50, 8, 11
    monkeypatch.setattr(distill, "LOGITS", rows * vocabulary)
    teacher = Head(table=normal(vocabulary, width), softcap=softcap)
    student = Head(table=normal(vocabulary, width, seed=1), softcap=softcap)
    taught, hidden = normal(positions, width, seed=2), normal(positions, width, seed=3).requires_grad_(True)
    loss = distillation_loss(hidden, student, Full(hidden=taught, head=teacher))
    (2 * loss).backward()  # type: ignore[no-untyped-call]
    again = hidden.detach().clone().requires_grad_(True)
    log_p, log_q = teacher.logits(taught).log_softmax(-1), student.logits(again).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (2 * expected).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, again.grad)


def test_a_student_that_is_the_teacher_loses_nothing() -> None:
    head, hidden = Head(table=normal(30, 4), softcap=None), normal(5, 4).requires_grad_(True)
    loss = distillation_loss(hidden, head, Full(hidden=hidden.detach(), head=head))
    loss.backward()  # type: ignore[no-untyped-call]
    assert abs(float(loss.detach())) < 1e-6
    assert hidden.grad is not None and float(hidden.grad.abs().max()) < 1e-6


def test_counts_of_draws_are_unbiased() -> None:
    """4,000 times 256 draws of 1,000 tokens: the mean of the targets is within 0.02 of the teacher's (L1)."""
    head, hidden = Head(table=normal(1000, 16), softcap=None), normal(1, 16) / 2
    p = head.logits(hidden)[0].softmax(-1)
    generator = torch.Generator().manual_seed(0)
    ids = Sampled.draw(hidden.expand(4000, -1), head, 256, generator).ids
    assert ids.shape == (4000, 256)
    mean = torch.bincount(ids.flatten(), minlength=1000) / ids.numel()
    assert float((mean - p).abs().sum()) < 0.02


def test_the_loss_on_draws_is_their_cross_entropy_less_their_entropy() -> None:
    head, hidden = Head(table=normal(20, 4), softcap=None), normal(3, 4, seed=1).requires_grad_(True)
    ids = torch.tensor([[1, 1, 5, 7], [0, 0, 0, 0], [2, 3, 4, 5]])
    loss = distillation_loss(hidden, head, Sampled(ids=ids))
    loss.backward()  # type: ignore[no-untyped-call]
    again = hidden.detach().clone().requires_grad_(True)
    p = torch.zeros(3, 20).scatter_add_(1, ids, torch.full((3, 4), 0.25))
    log_q = head.logits(again).log_softmax(-1)
    expected = (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, again.grad)
