"""Objectives against known answers: closed forms, exact gradients of tabular policies, hand derivations.

Where a loss is of samples, its mean gradient over 200,000 prompts is compared with the exact one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from transom.training.objectives.alignment import Method, Samples
from transom.training.objectives.best_of_n import BestOfN
from transom.training.objectives.bond import Bond, best_of_n, log_best_of_n, most_divergence, quantiles
from transom.training.objectives.dpo import Dpo
from transom.training.objectives.jbond import PENALTY, JBond, jbond_rewards
from transom.training.objectives.rloo import Rloo, leave_one_out
from transom.training.objectives.rrhf import Rrhf

PROMPTS = 200_000
POLICY, ANCHOR = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.3, 0.4])
REWARDS = torch.tensor([0.0, 1.0, 3.0])


def samples(source: torch.Tensor, count: int, logits: torch.Tensor, generator: torch.Generator) -> Samples:
    """Of a policy over a few outcomes, the same for all prompts."""
    outcomes = source.multinomial(PROMPTS * count, replacement=True, generator=generator).view(PROMPTS, count)
    return Samples(
        log_probs=logits.log_softmax(-1)[outcomes],
        anchor_log_probs=ANCHOR.log()[outcomes],
        rewards=REWARDS[outcomes],
        lengths=torch.ones_like(outcomes),
    )


def chosen(method: Method, drawn: Samples) -> Samples:
    """What a method says that it reads of the anchor's samples."""
    places, anchor = method.chosen(drawn.rewards), drawn.anchor_log_probs
    assert anchor is not None
    return dataclasses.replace(
        drawn,
        log_probs=drawn.log_probs.gather(1, places),
        anchor_log_probs=anchor.gather(1, places) if method.compares else None,
    )


def mean_gradient(method: Method) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = POLICY.log().requires_grad_(True)
    own = samples(POLICY, method.own, logits, generator) if method.own else None
    anchored = chosen(method, samples(ANCHOR, method.anchored, logits, generator)) if method.anchored else None
    method.loss(own, anchored).value.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad


def ascent(worth: torch.Tensor) -> torch.Tensor:
    """Gradient of -E[worth] under the policy, for its logits."""
    return -POLICY * (worth - (POLICY * worth).sum())


KL = ascent(-(POLICY / ANCHOR).log())
"""Gradient of KL(policy || anchor)."""


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=0.01, rtol=0)


def test_best_of_n_in_closed_form() -> None:
    distribution = best_of_n(torch.tensor([0.5, 0.3, 0.2]), REWARDS, 2)
    torch.testing.assert_close(distribution, torch.tensor([0.25, 0.39, 0.36]))
    uniform = best_of_n(torch.full((4,), 0.25), torch.arange(4.0), 2)
    torch.testing.assert_close(uniform, torch.tensor([1.0, 3, 5, 7]) / 16)
    again = best_of_n(best_of_n(POLICY, REWARDS, 2), REWARDS, 4)
    torch.testing.assert_close(again, best_of_n(POLICY, REWARDS, 8))
    uniform = torch.full((64,), 1 / 64, dtype=torch.float64)
    best = best_of_n(uniform, torch.arange(64.0), 8)
    divergence = float((best * (best / uniform).log()).sum())
    assert divergence == pytest.approx(1.20378, abs=1e-5) and divergence <= most_divergence(8)
    assert most_divergence(8) == pytest.approx(1.20444, abs=1e-5)


@pytest.mark.parametrize("rewards", [[0.0, 0, 1], [2.0, 1, 2], [1.0, 1, 1]])
def test_best_of_n_with_ties(rewards: list[float]) -> None:
    """Against all outcomes of three draws, equal ones chosen among evenly."""
    worth, expected = torch.tensor(rewards), torch.zeros(3)
    for draws in itertools.product(range(3), repeat=3):
        best = [draw for draw in draws if rewards[draw] == max(rewards[d] for d in draws)]
        for draw in best:
            expected[draw] += float(POLICY[list(draws)].prod()) / len(best)
    torch.testing.assert_close(best_of_n(POLICY, worth, 3), expected)


def test_quantiles() -> None:
    worse, equal = quantiles(torch.tensor([[1.0, 5.0, 0.0]]), torch.tensor([[1.0, 0.0, 2.0, 1.0]]))
    assert worse.tolist() == [[0.25, 1.0, 0.0]] and equal.tolist() == [[0.5, 0.0, 0.25]]


def test_learning_the_best_goes_to_the_best_of_n() -> None:
    """Of the anchor, as its gradient says: policy - best of n."""
    close(mean_gradient(BestOfN(samples=3)), POLICY - best_of_n(ANCHOR, REWARDS, 3))
    close(mean_gradient(Bond(n=3, samples=3, beta=0.0)), POLICY - best_of_n(ANCHOR, REWARDS, 3))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_policy_gradient(beta: float) -> None:
    close(mean_gradient(Rloo(samples=2, beta=beta)), ascent(REWARDS) + beta * KL)


def test_leave_one_out() -> None:
    worth = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])
    assert leave_one_out(worth).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    assert leave_one_out(torch.tensor([2.0])).tolist() == [2.0]


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_bond_goes_to_the_best_of_n(beta: float) -> None:
    """Backward and Jeffreys, with quantiles of 64 samples: the exact gradient, as near as their logarithms are."""
    best = best_of_n(ANCHOR, REWARDS, 3)
    expected = (1 - beta) * (POLICY - best) + beta * ascent((best / POLICY).log())
    torch.testing.assert_close(mean_gradient(Bond(n=3, samples=64, beta=beta)), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("beta", "distance"), [(0.0, 7.1e-4), (0.5, 4.2e-4), (1.0, 4.2e-4)])
def test_bond_arrives(beta: float, distance: float) -> None:
    """Exact gradients of a policy over eight outcomes, 4,000 steps of 0.5: total variation to the best of eight."""
    anchor = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    below, best = anchor.cumsum(-1) - anchor, best_of_n(anchor, torch.arange(8.0), 8)
    policy = anchor.clone()
    logits = anchor.log()
    worth = log_best_of_n(below, below + anchor, 8)
    for _ in range(4000):
        policy = logits.softmax(-1)
        reward = worth - (policy / anchor).log()
        backward = -policy * (reward - (policy * reward).sum())
        logits = logits - 0.5 * ((1 - beta) * (policy - best) + beta * backward)
    assert float((policy - best).abs().sum() / 2) < 2 * distance


def test_jbond_penalises_a_third() -> None:
    """While policy and anchor are one, whatever the reward; its mean is then -0.92."""
    rewards = torch.rand(PROMPTS, 3, generator=torch.Generator().manual_seed(0))
    values = jbond_rewards(rewards[:, 0], rewards[:, 1:])
    share = float((values == PENALTY).float().mean())
    assert share == pytest.approx(1 / 3, abs=0.005) and float(values.mean()) == pytest.approx(-0.924, abs=0.015)


@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5)])
def test_jbond(beta: float, gamma: float) -> None:
    below = torch.tensor([(ANCHOR * (REWARDS > reward)).sum() for reward in REWARDS]) ** 2
    worth = PENALTY * below - (POLICY / ANCHOR).log()
    expected = (1 - beta) * (POLICY - best_of_n(ANCHOR, REWARDS, 2)) + beta * ascent(worth) + gamma * KL
    torch.testing.assert_close(mean_gradient(JBond(beta=beta, gamma=gamma)), expected, atol=0.02, rtol=0)


def given(log_probs: list[list[float]], anchor: list[list[float]], rewards: list[list[float]]) -> Samples:
    return Samples(
        log_probs=torch.tensor(log_probs).requires_grad_(True),
        anchor_log_probs=torch.tensor(anchor),
        rewards=torch.tensor(rewards),
        lengths=torch.tensor([[1, 2, 4]] * len(rewards)),
    )


def test_dpo_by_hand() -> None:
    """-log sigmoid(0.5 * ((-1 + 2) - (-3 + 3))) on the best and the worst; the second prompt has no pair."""
    drawn = given([[-3.0, -2.0, -1.0], [-1.0, -1.0, -1.0]], [[-3.0, -2.0, -2.0], [-1.0] * 3], [[0, 1, 2], [1, 1, 1]])
    method = Dpo(samples=3, beta=0.5)
    loss = method.loss(None, chosen(method, drawn))
    (gradient,) = torch.autograd.grad(loss.value, drawn.log_probs)
    assert float(loss.value.detach()) == pytest.approx(math.log(1 + math.exp(-0.5)))
    slope = 0.5 / (1 + math.exp(0.5))
    torch.testing.assert_close(gradient, torch.tensor([[slope, 0.0, -slope], [0.0, 0.0, 0.0]]))
    assert loss.metrics == {"pairs": 0.5, "accuracy": 1.0}


def test_dpo_without_a_pair() -> None:
    drawn = given([[-3.0, -2.0, -1.0]], [[-1.0, -1.0, -1.0]], [[1, 1, 1]])
    loss = Dpo(samples=3).loss(None, chosen(Dpo(samples=3), drawn)).value
    (gradient,) = torch.autograd.grad(loss, drawn.log_probs)
    assert float(loss.detach()) == 0 and not gradient.any()


def test_rrhf_by_hand() -> None:
    """Mean log p a token are -3, -1, -0.5, so the order of rewards 2, 1, 1 is wrong by 2 and 2.5; 3 for the best."""
    drawn = given([[-3.0, -2.0, -2.0]], [[0.0, 0.0, 0.0]], [[2, 1, 1]])
    loss = Rrhf(samples=3).loss(None, drawn)
    (gradient,) = torch.autograd.grad(loss.value, drawn.log_probs)
    assert float(loss.value.detach()) == pytest.approx(2 + 2.5 + 3) and loss.metrics["ranking"] == pytest.approx(4.5)
    torch.testing.assert_close(gradient, torch.tensor([[-3.0, 0.5, 0.25]]))
