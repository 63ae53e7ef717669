"""WARP: what `align --rounds` writes equals runs, slerp and liti by hand; it goes on to the bit from anywhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.conftest import Cli
from transom.errors import TrainingError
from transom.graphs.weight import Weight
from transom.training.align import AlignSettings, align, read_recipe
from transom.training.averaging import liti, slerp
from transom.training.loop import Metrics
from transom.zoo.model import Model, load

WARP = AlignSettings.of(
    reward="instructions", steps=3, batch=4, max_new=4, learning_rate=1e-3, rounds=2, runs=2, eta=0.4, save_every=1,
    options={"samples": 4}, seed=1,
)  # fmt: skip


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    kinds = [{"kind": "lower_case"}, {"kind": "characters", "at_most": 3}]
    path.write_text("\n".join(json.dumps({"prompt": "ab" * count, "instructions": kinds}) for count in (1, 2, 9)))
    return path


@pytest.fixture(scope="module")
def whole(tiny: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Metrics]]:
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("warp") / "whole"
    metrics = align(tiny, WARP, data=data, out=folder)
    assert [path.name for path in folder.parent.iterdir()] == ["whole"]
    return folder, list(metrics)


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {name: weight.read() for name, weight in model.weights.items()}


def same(first: Model, second: Model) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_runs_then_slerp_then_liti(
    tiny: Model, data: Path, whole: tuple[Path, list[Metrics]], tmp_path: Path
) -> None:
    start = tiny
    for round in range(2):
        ends = []
        for run in range(2):
            plain = dataclasses.replace(WARP, rounds=0, seed=(1 * 2 + round) * 2 + run)
            align(start, plain, data=data, out=tmp_path / f"{round}{run}")
            ends.append(tensors(load(tmp_path / f"{round}{run}")))
        assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), "the runs differ"
        merged = {}
        for name, begin in tensors(start).items():
            moved = slerp([end[name].double() - begin.double() for end in ends])
            merged[name] = liti(begin.double(), begin.double() + moved, 0.4).float()
        start = dataclasses.replace(start, weights={name: Weight.of(tensor) for name, tensor in merged.items()})
    for name, tensor in tensors(load(whole[0])).items():
        torch.testing.assert_close(tensor, merged[name])
        assert (tensor - tiny.weights[name].read()).abs().max() > 0


def test_what_is_written(whole: tuple[Path, list[Metrics]]) -> None:
    folder, metrics = whole
    assert read_recipe(folder / "recipe.toml") == WARP and WARP.objective == "rloo" and WARP.anchor_rate == 0.01
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    order = [(line["round"], line["run"], line["step"]) for line in lines]
    assert order == [(round, run, step) for round in (1, 2) for run in (1, 2) for step in (1, 2, 3)]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics]
    rounds = json.loads((folder / "training.json").read_text())["warp"]
    assert [line["seeds"] for line in rounds] == [[4, 5], [6, 7]]
    assert all(0 < line["median_angle_degrees"] < 180 for line in rounds)


# Steps done in all runs: within the first run, at its end, and in the first run of round 2.
@pytest.mark.parametrize("stops", [(2, 8), (3, 6, 12)])
def test_a_run_goes_on_to_the_bit(
    stops: tuple[int, ...], tiny: Model, data: Path, whole: tuple[Path, list[Metrics]], tmp_path: Path
) -> None:
    places: list[int] = []
    for place in stops:

        def stop(done: int, total: int, metrics: Metrics, place: int = place) -> None:
            assert total == 12
            places.append(done)
            if done == place:
                raise StoppedError

        with pytest.raises(StoppedError):
            align(tiny, WARP, data=data, out=tmp_path / "parts", on_step=stop)
        assert not (tmp_path / "parts").exists()
    metrics = align(tiny, WARP, data=data, out=tmp_path / "parts")
    assert places == sorted(places) and len(places) < 12 + len(stops), "what is done is not done again"
    assert metrics == whole[1] and same(load(tmp_path / "parts"), load(whole[0]))
    report = "training.json"
    assert (tmp_path / "parts" / report).read_text() == (whole[0] / report).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_a_round_that_was_merged_is_not_trained_again(
    tiny: Model, data: Path, whole: tuple[Path, list[Metrics]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after everything was merged, and before it was written."""

    def fail(*_: object, **__: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr("transom.training.align.write_trained", fail)
        align(tiny, WARP, data=data, out=tmp_path / "out")
    kept = {path.name for path in (tmp_path / ".out.runs").iterdir() if path.suffix == ".safetensors"}
    assert kept == {"start-2.safetensors"}, "weights that went into others are gone"
    monkeypatch.setattr("transom.training.runs.Loop", fail)
    assert align(tiny, WARP, data=data, out=tmp_path / "out") == whole[1]
    assert same(load(tmp_path / "out"), load(whole[0]))


def test_one_run_a_round_is_a_step_back_to_the_start(tiny: Model, data: Path, tmp_path: Path) -> None:
    single = dataclasses.replace(WARP, rounds=1, runs=1, steps=1)
    align(tiny, single, data=data, out=tmp_path / "warp")
    align(tiny, dataclasses.replace(single, rounds=0, seed=1), data=data, out=tmp_path / "plain")
    merged, plain = tensors(load(tmp_path / "warp")), tensors(load(tmp_path / "plain"))
    for name, begin in tensors(tiny).items():
        torch.testing.assert_close(merged[name], liti(begin, plain[name], 0.4))


def test_runs_of_other_settings_are_refused(tiny: Model, data: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, metrics: Metrics) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        align(tiny, WARP, data=data, out=tmp_path / "out", on_step=stop)
    with pytest.raises(TrainingError, match=r"\.out\.runs is of runs with another model, text or settings"):
        align(tiny, dataclasses.replace(WARP, eta=0.5), data=data, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft", "reward": "", "anchor_rate": 0.0, "options": {}}, "learn from a reward: name one"),
        ({"runs": 0}, "runs is 0: give 1 or more"),
        ({"rounds": -1}, "-1 rounds"),
        ({"eta": 1.5}, "eta 1.5: give 0 or more, and a share"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        dataclasses.replace(WARP, **changes)  # type: ignore[arg-type]


def test_the_command(cli: Cli, data: Path, tmp_path: Path) -> None:
    short = ("--rounds", 1, "--runs", 2, "--steps", 1, "--batch", 1, "--max-new", 2, "--json")
    code, out, err = cli(
        "align", "gemma3-tiny", "--data", data, "-o", tmp_path / "o", "--reward", "instructions", *short
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["settings"]["objective"] == "rloo" and report["settings"]["anchor_rate"] == 0.01
    assert [(line["round"], line["run"]) for line in report["metrics"]] == [(1, 1), (1, 2)]
    (tmp_path / "none.toml").write_text('reward = "instructions"')
    code, _, err = cli("align", "gemma3-tiny", "--data", data, "-o", tmp_path / "p", "--recipe", tmp_path / "none.toml")
    assert code == 2 and "names no objective" in err
