"""Distillation losses: values and gradients against autograd over all logits, and what readings of samples cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from transom.training import divergence
from transom.training.divergence import READINGS, Full, Head, Sparse, distillation_loss


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("forward", [1.0, 0.0, 0.3], ids="{} forward".format)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 4, 100], ids="{} rows at a time".format)
def test_against_autograd(rows: int, softcap: float | None, forward: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, width, positions = 50, 8, 11
    monkeypatch.setattr(divergence, "LOGITS", rows * vocabulary)
    teacher = Head(table=normal(vocabulary, width), softcap=softcap)
    student = Head(table=normal(vocabulary, width, seed=1).requires_grad_(True), softcap=softcap)
    taught, hidden = normal(positions, width, seed=2), normal(positions, width, seed=3).requires_grad_(True)
    loss = distillation_loss(hidden, student, Full(hidden=taught, head=teacher, forward=forward))
    (2 * loss).backward()  # type: ignore[no-untyped-call]
    again = hidden.detach().clone().requires_grad_(True)
    table = student.table.detach().clone().requires_grad_(True)
    log_p, log_q = (
        teacher.logits(taught).log_softmax(-1),
        Head(table=table, softcap=softcap).logits(again).log_softmax(-1),
    )
    forwards, backwards = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = (forward * forwards + (1 - forward) * backwards).mean()
    (2 * expected).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, again.grad)
    torch.testing.assert_close(student.table.grad, table.grad)


def test_a_student_that_is_the_teacher_loses_nothing() -> None:
    head, hidden = Head(table=normal(30, 4), softcap=None), normal(5, 4).requires_grad_(True)
    for forward in (1.0, 0.5, 0.0):
        loss = distillation_loss(hidden, head, Full(hidden=hidden.detach(), head=head, forward=forward))
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert abs(float(loss.detach())) < 1e-6 and float(gradient.abs().max()) < 1e-6


def test_how_far_each_reading_is_from_the_teacher() -> None:
    """L1 between the mean of 4,000 targets of 256 samples and the 1,000 probabilities, as numpy finds it."""
    random = np.random.default_rng(0)
    logits = random.normal(size=1000) * 2
    p = np.exp(logits) / np.exp(logits).sum()
    head, hidden = Head(table=torch.from_numpy(logits).float()[:, None], softcap=None), torch.ones(4000, 1)
    distances = {}
    for reading in READINGS:
        drawn = Sparse.draw(hidden, head, 256, torch.Generator().manual_seed(0), reading)
        torch.testing.assert_close(drawn.shares.sum(-1), torch.ones(4000))
        mean = torch.zeros(1000).index_add_(0, drawn.ids.flatten(), drawn.shares.flatten()) / 4000
        distances[reading] = float((mean - torch.from_numpy(p)).abs().sum())
    assert distances["counts"] == pytest.approx(0.0155, abs=0.003)
    assert distances["renorm"] == pytest.approx(0.456, abs=0.01)
    assert distances["top_k"] == pytest.approx(0.207, abs=0.001)
    assert distances["counts"] < distances["renorm_wor"] < distances["renorm"]


def test_counts_are_kept_once_a_token() -> None:
    head, hidden = Head(table=normal(20, 4), softcap=None), normal(300, 4, seed=1)
    drawn = Sparse.draw(hidden, head, 16, torch.Generator().manual_seed(3))
    again = torch.Generator().manual_seed(3)
    ids = head.logits(hidden).softmax(-1).multinomial(16, replacement=True, generator=again)
    dense = torch.zeros(300, 20).scatter_add_(1, ids, torch.full((300, 16), 1 / 16))
    assert torch.equal(torch.zeros(300, 20).scatter_add_(1, drawn.ids, drawn.shares), dense)
    for row, shares in zip(drawn.ids.tolist(), drawn.shares, strict=True):
        kept = [token for token, share in zip(row, shares, strict=True) if share > 0]
        assert len(kept) == len(set(kept))


def test_no_more_tokens_than_there_are() -> None:
    head, hidden = Head(table=normal(20, 4), softcap=None), normal(3, 4, seed=1)
    p = head.logits(hidden).softmax(-1)
    for reading in ("renorm_wor", "top_k"):
        drawn = Sparse.draw(hidden, head, 256, None, reading)
        torch.testing.assert_close(torch.zeros(3, 20).scatter_add_(1, drawn.ids, drawn.shares), p)


@pytest.mark.parametrize("reading", list(READINGS))
def test_the_loss_on_samples_is_their_divergence(reading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "LOGITS", 2 * 20)
    head, hidden = Head(table=normal(20, 4), softcap=None), normal(5, 4, seed=1).requires_grad_(True)
    drawn = Sparse.draw(normal(5, 4, seed=2), head, 6, torch.Generator().manual_seed(1), reading)
    loss = distillation_loss(hidden, head, drawn)
    loss.backward()  # type: ignore[no-untyped-call]
    again = hidden.detach().clone().requires_grad_(True)
    p = torch.zeros(5, 20).scatter_add_(1, drawn.ids, drawn.shares)
    log_q = head.logits(again).log_softmax(-1)
    expected = (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, again.grad)
