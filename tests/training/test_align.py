"""`transom align`: from prompts to a checkpoint, by a recipe that is written into it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import Cli
from transom.errors import RewardError, TrainingError
from transom.training.align import METHODS, AlignSettings, align, read_recipe, write_recipe
from transom.training.loop import Metrics
from transom.training.rollouts import ROLLOUTS
from transom.zoo.model import Model, load

SHORT = AlignSettings(
    objective="jbond", reward="instructions", steps=4, batch=4, parts=2, max_new=6, learning_rate=1e-3, anchor_rate=0.1,
    save_every=2, rollouts="torch",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    kinds = [{"kind": "lower_case"}, {"kind": "characters", "at_most": 3}]
    lines = [{"prompt": "ab" * count, "answer": "xyz", "instructions": kinds} for count in (1, 2, 9)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("objective", ["sft", *METHODS])
def test_every_objective(objective: str, tiny: Model, data: Path, tmp_path: Path) -> None:
    """Runs, changes the weights, and writes what it did."""
    plain = {"reward": "", "anchor_rate": 0.0} if objective == "sft" else {}
    settings = dataclasses.replace(SHORT, objective=objective, steps=2, **plain)  # type: ignore[arg-type]
    metrics = align(tiny, settings, data=data, out=tmp_path / "out")
    trained = load(tmp_path / "out")
    assert any(not torch.equal(trained.weights[n].read(), weight.read()) for n, weight in tiny.weights.items())
    assert read_recipe(tmp_path / "out" / "recipe.toml") == settings
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics] and len(lines) == 2
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"] == dataclasses.asdict(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("rollouts", ROLLOUTS)
def test_a_run_goes_on_to_the_bit(rollouts: str, tiny: Model, data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, rollouts=rollouts)
    whole = align(tiny, settings, data=data, out=tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, metrics: Metrics) -> None:
        if done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        align(tiny, settings, data=data, out=tmp_path / "parts", on_step=stop)
    assert not (tmp_path / "parts").exists()
    assert align(tiny, settings, data=data, out=tmp_path / "parts") == whole
    first, second = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert all(torch.equal(first.weights[name].read(), weight.read()) for name, weight in second.weights.items())
    # What another run wrote may be replaced; what nobody wrote may not.
    align(tiny, settings, data=data, out=tmp_path / "parts", overwrite=True)


def test_a_reward_that_cannot_be_computed_ends_the_run(tiny: Model, tmp_path: Path) -> None:
    """Counting it as zero would teach the policy to avoid what the data breaks on."""
    (tmp_path / "data").write_text(json.dumps({"prompt": "a", "instructions": [{"kind": "poem"}]}))
    with pytest.raises(RewardError, match="could not be scored"):
        align(tiny, SHORT, data=tmp_path / "data", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ppo"}, "choose sft, best_of_n, rloo"),
        ({"objective": "sft"}, "sft learns answers, so it takes no reward"),
        ({"reward": ""}, "learns from a reward: name one"),
        ({"objective": "dpo", "reward": "", "options": {"samples": 2}}, "nothing is sampled"),
        ({"objective": "rrhf", "reward": ""}, "with no anchor: leave its rate out"),
        ({"objective": "dpo", "reward": "", "rounds": 2}, "rounds of runs .* learn from a reward"),
        ({"objective": "sft", "reward": ""}, "sft has no numbers of its own, nor an anchor"),
        ({"parts": 3}, "a batch of 4 does not go into 3 equal parts"),
        ({"rollouts": "vllm"}, "nothing samples by the name 'vllm': choose torch or onnxruntime"),
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"anchor_rate": 1.5}, "give a share from 0 to 1"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        dataclasses.replace(SHORT, **changes)  # type: ignore[arg-type]


def test_numbers_of_another_objective(tiny: Model, data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, options={"samples": 2})
    with pytest.raises(TrainingError, match="the objective jbond takes beta, gamma, not samples"):
        align(tiny, settings, data=data, out=tmp_path / "out")


def test_what_samples_by_default() -> None:
    assert AlignSettings.of(objective="sft").rollouts == "onnxruntime"
    assert AlignSettings.of(objective="sft", device="cuda").rollouts == "torch"


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    settings = dataclasses.replace(SHORT, options={"beta": 0.25}, reward_options={}, device="cpu")
    write_recipe(settings, path)
    assert read_recipe(path) == settings
    assert read_recipe(path, steps=9) == dataclasses.replace(settings, steps=9)
    for text, message in (
        ("steps = ", "write TOML"),
        ('steps = "many"', "sets steps to 'many', which is no int"),
        ("steps = true", "which is no int"),
        ("pace = 1", "sets pace, which is no setting"),
    ):
        path.write_text(text)
        with pytest.raises(TrainingError, match=message):
            read_recipe(path)
    with pytest.raises(TrainingError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")


def test_the_command(cli: Cli, data: Path, tmp_path: Path) -> None:
    write_recipe(SHORT, tmp_path / "recipe.toml")
    arguments = ("align", "gemma3-tiny", "--data", data, "-o", tmp_path / "out")
    options = ("--steps", "2", "--option", "beta=0.25", "--json")
    code, out, err = cli(*arguments, "--recipe", tmp_path / "recipe.toml", *options)
    assert code == 0, err
    report = json.loads(out)
    assert report["settings"]["options"] == {"beta": 0.25} and len(report["metrics"]) == 2
    assert read_recipe(tmp_path / "out" / "recipe.toml").options == {"beta": 0.25}
    for more, message in (
        ((), "--overwrite"),
        (("--overwrite",), "give an --objective, or a --recipe"),
        (("--overwrite", "--objective", "rloo", "--reward", "praise"), "there is no reward 'praise'"),
        (("--overwrite", "--objective", "rloo", "--option", "beta=much"), "--option takes NAME=NUMBER"),
    ):
        code, _, err = cli(*arguments, *more)
        assert code == 2 and message in err and len(err.splitlines()) == 1
