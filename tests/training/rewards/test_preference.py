"""The Bradley-Terry head: its loss, the pairs it learns, its files, and the states it reads of a model of the zoo."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from transom.errors import RewardError
from transom.graphs.graph import Graph
from transom.training.quantize import score_graph
from transom.training.rewards.preference import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Pair,
    Preference,
    PreferenceModel,
    Probe,
    accuracy,
    fit_head,
    pairwise_loss,
    read_pairs,
)
from transom.training.stages import Stages
from transom.zoo.model import Model

WIDTH = 8


def encode(prompt: str, completion: str) -> list[int]:
    return list((prompt + completion).encode())


def counts(tokens_BT: torch.Tensor) -> torch.Tensor:
    """Causal: how often each of some letters stands before, per token."""
    letters = torch.tensor(list(b"abcdefgh"))
    return (tokens_BT[..., None] == letters).float().cumsum(1)


def plain() -> PreferenceModel:
    return PreferenceModel(counts, encode, WIDTH)


PAIRS = [Pair("x", "a" * n + "c" * m, "b" * n + "c" * m) for n in range(1, 4) for m in range(4)]
"""People like the letter a and dislike b; c is in both."""


def test_the_loss_is_that_of_bradley_and_terry() -> None:
    loss = pairwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert float(loss) == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)
    large = torch.tensor([-1e4], requires_grad=True)
    pairwise_loss(large, torch.tensor([1e4])).backward()  # type: ignore[no-untyped-call]
    assert large.grad is not None and float(large.grad) == -1.0, "neither overflow nor a vanished gradient"


def test_the_head_learns_what_is_preferred() -> None:
    model = plain()
    assert accuracy(model, PAIRS) == 0.5, "it begins with ties"
    assert float(model.loss(PAIRS).detach()) == pytest.approx(math.log(2))
    loss = fit_head(model, PAIRS)
    assert loss < 0.1 and loss == pytest.approx(float(model.loss(PAIRS).detach()))
    a, b, *others = model.head.weight[0].tolist()
    assert a > 0 > b and a == pytest.approx(-b) and others == [0.0] * 6
    assert accuracy(model, [Pair("y", "aad", "abd"), Pair("y", "d", "b")]) == 1.0


def test_the_head_is_the_best_of_its_loss() -> None:
    """One feature, three wins and one loss: sigmoid of its weight is 3/4."""
    model = plain()
    fit_head(model, [Pair("", "a", "c")] * 3 + [Pair("", "c", "a")], Probe(decay=0.0))
    a, _, c, *_ = model.head.weight[0].tolist()
    assert a - c == pytest.approx(math.log(3))


def test_a_batch_is_each_by_itself() -> None:
    """What fills up the shorter rows is not seen."""
    model = plain()
    fit_head(model, PAIRS)
    texts = [("x", "a"), ("", "b" * 9), ("xyz", "abc")]
    torch.testing.assert_close(model(texts), torch.cat([model([text]) for text in texts]))


def test_the_reward_is_the_head_s() -> None:
    model = plain()
    fit_head(model, PAIRS)
    reward = Preference(model)
    value = reward.score("x", "aa", {}).value
    assert value == float(model([("x", "aa")]).detach()) > 0
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    assert reward.score("x", "aa", {}).value is None


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = plain()
    fit_head(model, PAIRS)
    model.save(tmp_path / "head")
    again = PreferenceModel.load(tmp_path / "head", counts, encode)
    assert torch.equal(again.head.weight, model.head.weight)


def test_files_that_are_no_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"holds no preference\.json"):
        PreferenceModel.load(tmp_path, counts, encode)
    plain().save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"kind": "bradley-terry", "width": 9}')
    with pytest.raises(RewardError, match="the head is not 9 finite numbers"):
        PreferenceModel.load(tmp_path, counts, encode)
    (tmp_path / CONFIG_FILE).write_text('{"kind": "other", "width": 8}')
    with pytest.raises(RewardError, match="describes no preference model"):
        PreferenceModel.load(tmp_path, counts, encode)
    plain().save(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"cut")
    with pytest.raises(RewardError, match="holds no head"):
        PreferenceModel.load(tmp_path, counts, encode)


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RewardError, match="8 wide, and the head 4"):
        PreferenceModel(counts, encode, 4)([("x", "a")])
    with pytest.raises(RewardError, match="without any token"):
        plain()([("", "")])
    broken = PreferenceModel(lambda tokens: counts(tokens) / 0, encode, WIDTH)
    with pytest.raises(RewardError, match="NaN or infinite"):
        fit_head(broken, PAIRS)
    with pytest.raises(RewardError, match="no comparison"):
        fit_head(plain(), [])


def test_pairs_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [pair._asdict() for pair in PAIRS]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_pairs(path) == PAIRS
    for line in ('{"prompt": "x"}', "[]", "{", '{"prompt": 1, "chosen": "a", "rejected": "b"}'):
        path.write_text(json.dumps(rows[0]) + "\n" + line + "\n")
        with pytest.raises(RewardError, match="line 2: no object of prompt, chosen, rejected"):
            read_pairs(path)
    path.write_text("\n")
    with pytest.raises(RewardError, match="holds no comparison"):
        read_pairs(path)
    with pytest.raises(RewardError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")


@pytest.fixture(scope="module")
def graph(tiny: Model) -> Graph:
    return score_graph(tiny)


def test_a_model_of_the_zoo_is_trained_with_its_head(graph: Graph) -> None:
    """Gradients reach the model's weights once the head is fitted, and a step lowers the loss."""
    weights = {name: weight.read().clone().requires_grad_(True) for name, weight in graph.weights.items()}
    stages = Stages(graph)

    def texts(prompt: str, completion: str) -> Sequence[int]:
        return [2, *(ord(letter) % 200 + 3 for letter in prompt + completion)]

    width = int(stages.hidden(torch.tensor([[2]]), weights).shape[-1])
    model = PreferenceModel(lambda tokens_BT: stages.hidden(tokens_BT, weights), texts, width)
    pairs = [Pair("say ", "yes", "no"), Pair("tell ", "yes", "no"), Pair("say ", "no yes", "yes no")]
    before = fit_head(model, pairs, Probe(decay=0.1))
    assert before < math.log(2)
    optimizer = torch.optim.SGD([*weights.values(), *model.parameters()], lr=1e-3)
    loss = model.loss(pairs)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in weights.values())
    optimizer.step()
    assert float(model.loss(pairs).detach()) < float(loss.detach())
