"""DPO and RRHF on people's rankings in a file: losses and gradients by hand, unequal lists, resuming, errors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.conftest import Cli
from tests.tolerances import FP32_LOGITS
from transom.errors import TrainingError
from transom.training.align import AlignSettings, align, read_recipe
from transom.training.loop import Metrics
from transom.training.objectives.alignment import Method
from transom.training.objectives.dpo import Dpo
from transom.training.objectives.rankings import Rankings, ranked_ids
from transom.training.objectives.rrhf import Rrhf
from transom.training.policy import Policy
from transom.training.prompts import read_prompts
from transom.zoo.model import Model, load

# One prompt and response go past the window of the tiny model.
LINES = [
    {"prompt": "ab", "chosen": "xyz", "rejected": "no"},
    {"prompt": "ab" * 9, "chosen": "", "rejected": "yes"},
    {"prompt": "c", "ranked": ["first", "second", "3"]},
]
SETTINGS = AlignSettings(
    objective="dpo", options={"beta": 0.3}, steps=4, batch=3, max_new=8, learning_rate=1e-3, anchor_rate=0.1,
    save_every=2,
)  # fmt: skip
LEARNS = {"dpo": Dpo(beta=0.3), "rrhf": Rrhf()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rankings") / "rankings.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def log_prob(module: torch.nn.Module, prompt: tuple[int, ...], response: list[int]) -> torch.Tensor:
    """Log p of a response by a plain module: one sequence, no padding."""
    logits = module(torch.tensor([[*prompt, *response]]), torch.tensor(0), None)[0][0, len(prompt) - 1 : -1]
    result: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
    return result


@pytest.mark.parametrize("name", LEARNS)
def test_losses_and_gradients_by_hand(name: str, tiny: Model, data: Path) -> None:
    """The papers' formulas, written out for each line, on plain modules; DPO's is also trl's default."""
    assert tiny.tokenizer is not None
    prompts = read_prompts(tiny, data, max_new=8)
    responses = ranked_ids(tiny.tokenizer, prompts, 8)
    assert [len(each) for each in responses] == [2, 2, 3] and responses[1][0] == [tiny.tokenizer.eos_id]
    policy, anchor = Policy(tiny), Policy(tiny, trained=lambda name: False)
    with torch.no_grad():
        for weight in anchor.weights.values():
            weight.mul_(1.05)
    method: Method = LEARNS[name]
    (loss,) = Rankings(policy, anchor if method.compares else None, method, prompts, responses, batch=3).losses(0)
    loss.value.backward()  # type: ignore[no-untyped-call]

    module, reference = tiny.eager(), anchor.model().eager()
    parameters = {key: parameter for key, parameter in module.named_parameters() if key in policy.weights}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    losses = []
    for prompt, ranked in zip(prompts, responses, strict=True):
        scores = [log_prob(module, prompt.ids, ids) for ids in ranked]
        if name == "dpo":
            with torch.no_grad():
                best, worst = (log_prob(reference, prompt.ids, ids) for ids in (ranked[0], ranked[-1]))
            margin = 0.3 * ((scores[0] - best) - (scores[-1] - worst))
            losses.append((1 + (-margin).exp()).log())
        else:
            means = [score / len(ids) for score, ids in zip(scores, ranked, strict=True)]
            pairs = [(high, low) for high in range(len(means)) for low in range(high + 1, len(means))]
            losses.append(sum((means[low] - means[high]).clamp(min=0) for high, low in pairs) - scores[0])
    expected = torch.stack(losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), abs=FP32_LOGITS)
    for key, parameter in parameters.items():
        gradient, right = policy.weights[key].grad, parameter.grad
        assert gradient is not None and right is not None
        torch.testing.assert_close(gradient, right, atol=FP32_LOGITS, rtol=FP32_LOGITS, msg=key)


def test_preferences_are_learned(tiny: Model, data: Path, tmp_path: Path) -> None:
    """It begins at log 2, where policy and anchor are one; the metrics and the recipe are those of any objective."""
    settings = dataclasses.replace(SETTINGS, steps=12, anchor_rate=0.0)
    metrics = align(tiny, settings, data=data, out=tmp_path / "out")
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and metrics[-1]["loss"] < 0.3
    assert metrics[-1]["accuracy"] == 1.0
    assert read_recipe(tmp_path / "out" / "recipe.toml") == settings


def test_a_run_goes_on_to_the_bit(tiny: Model, data: Path, tmp_path: Path) -> None:
    """With a moving anchor, which is part of the state."""
    whole = align(tiny, SETTINGS, data=data, out=tmp_path / "whole")
    still = align(tiny, dataclasses.replace(SETTINGS, anchor_rate=0.0), data=data, out=tmp_path / "still")
    assert whole[0] == still[0] and whole[-1] != still[-1]

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, metrics: Metrics) -> None:
        if done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        align(tiny, SETTINGS, data=data, out=tmp_path / "parts", on_step=stop)
    assert align(tiny, SETTINGS, data=data, out=tmp_path / "parts") == whole
    first, second = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert all(torch.equal(first.weights[name].read(), weight.read()) for name, weight in second.weights.items())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"chosen": "a"}, "line 2 has `chosen`: give every line `chosen` and `rejected`, or `ranked` alone"),
        ({"rejected": "a"}, "line 2 has `rejected`: give"),
        ({}, "line 2 has none of them: give"),
        ({"chosen": "a", "rejected": "b", "ranked": ["a", "b"]}, "line 2 has `chosen`, `rejected`, `ranked`: give"),
        ({"ranked": ["a"]}, "line 2: `ranked` is no list of two or more texts"),
        ({"ranked": "ab"}, "line 2: `ranked` is no list"),
        ({"chosen": "a", "rejected": 1}, "line 2: a response is no text: write texts under chosen, rejected"),
        ({"chosen": "a", "rejected": "b" * 8}, "line 2: 'bbbbbbbb' is 9 tokens, 1 to 8 are allowed"),
    ],
)
def test_lines_that_are_refused(line: dict[str, object], message: str, tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_text(f"{json.dumps(LINES[0])}\n{json.dumps({'prompt': 'a', **line})}")
    with pytest.raises(TrainingError, match=message):
        align(tiny, SETTINGS, data=path, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rankings.jsonl"]


def test_the_command(cli: Cli, data: Path, tmp_path: Path) -> None:
    run = ("align", "gemma3-tiny", "--data", data, "--objective", "rrhf", "--steps", 1, "--batch", 3)
    code, out, err = cli(*run, "-o", tmp_path / "out", "--max-new", 8, "--json")
    assert code == 0, err
    assert json.loads(out)["settings"]["reward"] == "" and "ranking" in json.loads(out)["metrics"][0]
    code, _, err = cli(*run, "-o", tmp_path / "other", "--max-new", 2)
    assert code == 2 and "line 1: 'xyz' is 4 tokens" in err and len(err.splitlines()) == 1
    code, _, err = cli(*run, "-o", tmp_path / "other", "--max-new", 8, "--option", "samples=2")
    assert code == 2 and "leave `samples` out" in err
