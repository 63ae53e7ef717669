"""WARM: members of one start, averaged into a reward model that `align` opens by its folder."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import embedding

from tests.conftest import Cli
from transom.errors import RewardError, TokenizerError, TrainingError
from transom.training.align import read_recipe
from transom.training.averaging import mean
from transom.training.loop import Metrics
from transom.training.objectives.preference import HEAD
from transom.training.reward_model import AVERAGE, Accuracy, RewardModelSettings, train_reward_model
from transom.training.rewards.preference import PreferenceModel, read_pairs
from transom.training.rewards.reward import reward
from transom.training.runs import Runs
from transom.zoo.model import Model, load

SHORT = RewardModelSettings(
    members=2, learning_rates=(3e-4, 1e-3), steps=4, batch=4, parts=2, held_out=12, save_every=1
)


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People prefer completions that end in a, to those that end in b."""
    draw, path = random.Random(5), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for _ in range(36):
        prompt, chosen, rejected = ("".join(draw.choices("cdefg", k=draw.randint(1, 6))) for _ in range(3))
        lines.append(json.dumps({"prompt": prompt, "chosen": f"{chosen}a", "rejected": f"{rejected}b"}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def whole(
    tiny: Model, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Accuracy], list[Metrics]]:
    folder = tmp_path_factory.mktemp("warm") / "whole"
    accuracies, metrics = train_reward_model(tiny, SHORT, data=data, out=folder)
    assert [path.name for path in folder.parent.iterdir()] == ["whole"]
    return folder, accuracies, metrics


def test_weight_averages_keep_what_members_share() -> None:
    """Known answer: of a feature that a member learns with probability p, an ensemble keeps p, an average p squared."""
    members, learned = 20, torch.tensor([20, 10, 4, 0])
    models = []
    for member in range(members):
        # A member sees a feature and its head reads it, or neither; exactly p of the members see each.
        bits = ((member * 7 % members) < learned).float()
        table = torch.diag(bits)
        model = PreferenceModel(partial(embedding, weight=table), lambda _, text: [int(text)], 4)
        model.head.load_state_dict({"weight": bits[None]})
        models.append((table, model))
    texts = [("", str(feature)) for feature in range(4)]
    average_table = mean([table for table, _ in models])
    average = PreferenceModel(partial(embedding, weight=average_table), lambda _, text: [int(text)], 4)
    average.head.load_state_dict({"weight": mean([model.head.weight.detach() for _, model in models])})
    p = learned / members
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([model(texts) for _, model in models]).mean(0), p)
        torch.testing.assert_close(average(texts), p.square())


def test_the_average_is_the_mean_of_the_members(
    tiny: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head alone is where all begin; what is written is the average, body and head."""
    monkeypatch.setattr(Runs, "remove", lambda runs: None)
    settings = dataclasses.replace(SHORT, steps=1, held_out=0, learning_rates=(1e-3,))
    train_reward_model(tiny, settings, data=data, out=tmp_path / "out")
    digest = json.loads((tmp_path / "out/training.json").read_text())["data"]
    runs = Runs(tmp_path / "out", settings, tiny.revision, digest, total=0)
    parts = [runs.weights(name) for name in ("member-1", "member-2")]
    average = {name: mean([part[name].read() for part in parts]) for name in parts[0]}
    written = load(tmp_path / "out")
    head = PreferenceModel.load(tmp_path / "out", lambda tokens_BT: tokens_BT, lambda *_: []).head.weight
    for name, tensor in average.items():
        assert not torch.equal(parts[0][name].read(), parts[1][name].read()), (
            "members of one rate differ by their order"
        )
        assert torch.equal(head if name == HEAD else written.weights[name].read(), tensor)
        assert name == HEAD or not torch.equal(tensor, tiny.weights[name].read())
    assert not torch.equal(head, runs.weights("probe")[HEAD].read())


def test_the_reward_ranks_held_out_pairs(data: Path, whole: tuple[Path, list[Accuracy], list[Metrics]]) -> None:
    folder, accuracies, metrics = whole
    preference = reward("preference", model=str(folder))
    right = 0
    for pair in read_pairs(data)[-12:]:
        chosen, rejected = (preference.score(pair.prompt, text, {}).value for text in (pair.chosen, pair.rejected))
        assert chosen is not None and rejected is not None
        right += chosen > rejected
    assert [each.name for each in accuracies] == ["probe", "member 1", "member 2", AVERAGE]
    assert accuracies[-1].value == right / 12 >= 0.9 and accuracies[-1].pairs == 12
    report = json.loads((folder / "training.json").read_text())
    assert report["accuracy"] == [each.to_json() for each in accuracies]
    assert [line["member"] for line in metrics] == [1] * 4 + [2] * 4
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["member"], line["step"]) for line in lines] == [
        (member, step) for member in (1, 2) for step in (1, 2, 3, 4)
    ]


def test_rates_go_in_turn() -> None:
    assert [SHORT.loop(member).learning_rate for member in range(3)] == [3e-4, 1e-3, 3e-4]
    assert [SHORT.dropout(member) for member in range(3)] == [0.05, 0.1, 0.05]


def test_a_head_of_logits_that_no_reward_reads_stays(data: Path, tmp_path: Path) -> None:
    model = load("llama3-tiny")
    settings = dataclasses.replace(SHORT, members=1, steps=1, held_out=0)
    train_reward_model(model, settings, data=data, out=tmp_path / "out")
    written = load(tmp_path / "out").weights
    moved = {name for name, weight in written.items() if not torch.equal(weight.read(), model.weights[name].read())}
    assert moved == written.keys() - {"lm_head.weight"} != written.keys()


def test_the_interval_is_wilson_s() -> None:
    """Known values of the score interval at 95%: 9 of 10, and all of 20."""
    assert Accuracy(name="", value=0.9, pairs=10).interval == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert Accuracy(name="", value=1.0, pairs=20).interval == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_a_run_goes_on_to_the_bit(
    tiny: Model, data: Path, whole: tuple[Path, list[Accuracy], list[Metrics]], tmp_path: Path
) -> None:
    def stop(done: int, total: int, metrics: Metrics) -> None:
        assert total == 8
        if done == 6:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_reward_model(tiny, SHORT, data=data, out=tmp_path / "parts", on_step=stop)
    again = train_reward_model(
        tiny,
        SHORT,
        data=data,
        out=tmp_path / "parts",
        on_step=lambda done, total, _: None if done > 5 else stop(6, 8, {}),
    )
    assert again == whole[1:]
    first, second = load(whole[0]), load(tmp_path / "parts")
    assert all(torch.equal(first.weights[name].read(), weight.read()) for name, weight in second.weights.items())
    file = "preference.safetensors"
    assert (whole[0] / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_what_is_refused(tiny: Model, tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"members": 0}, "members is 0"),
        ({"parts": 3}, "a batch of 4 does not go into 3 equal parts"),
        ({"learning_rates": (1e-3, 0.0)}, "give positive numbers"),
        ({"dropouts": (0.1, 1.0)}, "give shares from 0 on and below 1"),
    ):
        with pytest.raises(TrainingError, match=message):
            dataclasses.replace(SHORT, **changes)
    settings = dataclasses.replace(SHORT, held_out=36)
    with pytest.raises(TrainingError, match="36 pairs, 36 held out: leave some to learn"):
        train_reward_model(tiny, settings, data=data, out=tmp_path / "out")
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        train_reward_model(dataclasses.replace(tiny, tokenizer=None), SHORT, data=data, out=tmp_path / "out")
    with pytest.raises(RewardError, match=r"holds no preference\.json: give a folder that transom reward-model wrote"):
        reward("preference", model=str(tiny_folder))
    with pytest.raises(RewardError, match="cannot be made of these options"):
        reward("preference")
    assert not list(tmp_path.iterdir())


def test_the_commands(cli: Cli, data: Path, tmp_path: Path) -> None:
    short = ("--members", 1, "--steps", 1, "--batch", 2, "--learning-rates", "1e-4,1e-3")
    command = ("reward-model", "gemma3-tiny", "--data", data, "-o", tmp_path / "rm", *short)
    code, out, err = cli(*command, "--held-out", 3)
    assert code == 0 and "member 1: " in out and "of 3 held-out pairs" in out, err
    code, out, err = cli(*command, "--overwrite", "--json")
    assert code == 0 and json.loads(out)["accuracy"] == [] and len(json.loads(out)["metrics"]) == 1, err
    for more, message in (
        ((), "--overwrite"),
        (("--overwrite", "--learning-rates", "many"), "--learning-rates takes numbers"),
        (("--overwrite", "--dropouts", "some"), "--dropouts takes numbers"),
        (("--overwrite", "--dtype", "int8"), "--dtype takes"),
    ):
        code, _, err = cli(*command, *more)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    align = ("align", "gemma3-tiny", "--data", data, "--objective", "rloo", "--reward", "preference", "--steps", 1)
    run = (*align, "--batch", 1, "--max-new", 2, "-o", tmp_path / "policy")
    code, _, err = cli(*run, "--reward-option", f"model={tmp_path / 'rm'}")
    assert code == 0, err
    assert read_recipe(tmp_path / "policy/recipe.toml").reward_options == {"model": str(tmp_path / "rm")}
    code, _, err = cli(*run, "--overwrite", "--reward-option", "model")
    assert code == 2 and "--reward-option takes NAME=VALUE" in err
