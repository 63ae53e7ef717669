"""`benchmarks.ablation`: its problems, a run in miniature that is not run twice, and the report of a few runs."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ablation import report, task, warm
from benchmarks.ablation import study as runs
from benchmarks.ablation.study import CONTENDERS, Cell, Contender
from benchmarks.ablation.task import ANSWER, PROMPT, Study
from transom.training.policy import Policy
from transom.training.prompts import Prompt
from transom.training.rewards.preference import Pair
from transom.zoo.model import Model

MINIATURE = Study(
    splits={"base": 60, "prompts": 40, "tuning": 20, "unseen": 30},
    answers=2, base_steps=4, steps=2, tuning_steps=2, samples=12, rates=(1e-3, 1e-2), every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base model, and the runs of two methods with two seeds of one and one of the other."""
    path = tmp_path_factory.mktemp("ablation")
    task.trained_base(MINIATURE, path)
    for name, seeds in (("J-BOND", 2), ("SFT", 1)):
        for cell in runs.tuning_cells(name, MINIATURE):
            runs.run(cell, MINIATURE, path)
        for cell in runs.cells(name, MINIATURE, path, seeds):
            runs.run(cell, MINIATURE, path)
    return path


def test_no_problem_is_in_two_splits() -> None:
    splits = task.split(Study())
    assert {name: len(prompts) for name, prompts in splits.items()} == Study().splits
    texts = [prompt.text for prompts in splits.values() for prompt in prompts]
    assert len(set(texts)) == len(texts) == 20_000
    with pytest.raises(ValueError, match="only 20,000"):
        task.split(dataclasses.replace(Study(), splits={"base": 20_001}))


def test_answers_are_right_and_fit() -> None:
    prompts = task.problems()
    for prompt in random.Random(0).sample(prompts, 500):
        assert prompt.reference["answer"] == str(eval(prompt.text.removesuffix("=")))
        assert len(prompt.ids) == PROMPT and task.decode(prompt.ids).strip() == prompt.text
    assert max(len(task.answer_ids(prompt.reference["answer"])) for prompt in prompts) == ANSWER
    assert task.untrained().config.longest_window == PROMPT < PROMPT + ANSWER
    assert task.exact(prompts[:2], ["0", "0"]) == [1.0, 0.0]


@pytest.mark.parametrize("answer", [0, 7, -99, 11, 198, 100])
def test_slips_are_wrong(answer: int) -> None:
    draw = random.Random(0)
    slips = {task.slip(answer, draw) for _ in range(200)}
    assert answer not in slips and len(slips) > 2 and max(len(str(wrong)) for wrong in slips) < ANSWER


def test_every_method_gets_as_many_samples() -> None:
    for contender in CONTENDERS.values():
        assert contender.method is None or Study().samples % (contender.method.own + contender.method.anchored) == 0


def test_runs_of_other_numbers_are_kept_apart() -> None:
    """A rate more leaves what was run."""
    study = Study()
    assert dataclasses.replace(study, steps=159).digest != study.digest
    assert dataclasses.replace(study, rates=(1e-2,)).digest == study.digest


def test_a_run_is_not_run_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(contender="J-BOND", rate=1e-2, seed=5, tuning=False)
    first = runs.run(cell, MINIATURE, folder)
    assert [point["step"] for point in first["points"]] == [1, 2]
    assert all(len(point[key]) == 30 for point in first["points"] for key in ("sampled", "greedy", "kl"))
    assert first["points"][0]["seconds"] < first["points"][1]["seconds"]
    monkeypatch.setattr(runs, "Loop", None)
    assert runs.run(cell, MINIATURE, folder) == first
    cell.path(folder).unlink()
    with pytest.raises(TypeError):
        runs.run(cell, MINIATURE, folder)


def test_warp_goes_from_round_to_round(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run begins where its round does, with an anchor and a seed of its own; merged models alone are measured."""
    begins, seeds = [], []
    original = runs.objective_of

    def watch(contender: Contender, study: Study, policy: Policy, anchor: Policy, *rest: Any) -> Any:
        begins.append([one.weights["norm.weight"].detach().clone() for one in (policy, anchor)])
        seeds.append(rest[-1])
        return original(contender, study, policy, anchor, *rest)

    monkeypatch.setattr(runs, "objective_of", watch)
    study = dataclasses.replace(MINIATURE, steps=4, every=2)
    cell = Cell(contender="J-BOND + WARP", rate=1e-2, seed=3, tuning=False)
    assert [point["step"] for point in runs.run(cell, study, folder)["points"]] == [2, 4]
    assert seeds == [12, 13, 14, 15]
    assert all(torch.equal(policy, anchor) for policy, anchor in begins)
    first, second, third, fourth = (policy for policy, _ in begins)
    assert torch.equal(first, second) and torch.equal(third, fourth) and not torch.equal(first, third)


def test_pairs_are_right_against_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong answer once, and none of a prompt whose samples are all right or all wrong."""
    prompts = task.problems()[5:8]
    right = [prompt.reference["answer"] for prompt in prompts]
    texts = ["1", right[0], "2", "1", *[right[1]] * 4, "1", "2", "3", "4"]
    monkeypatch.setattr(Policy, "sample", lambda *_, **__: [task.answer_ids(text) for text in texts])
    pairs = warm.pairs_of(task.trained_base(MINIATURE, folder), prompts, 0)
    assert pairs == [(prompts[0].text, right[0], "1"), (prompts[0].text, right[0], "2")]
    assert task.decode(warm.encode(*pairs[0][:2])) == f"  {pairs[0].prompt}{right[0]}\n"


def test_a_learned_reward(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """J-BOND is given the average's rewards; the reward models are trained once, and their time is every run's."""

    def pairs_of(base: Model, prompts: list[Prompt], seed: int) -> list[Pair]:
        return [Pair(prompt.text, prompt.reference["answer"], "7") for prompt in prompts]

    # Apart from the runs that other tests count.
    shutil.copy(folder / "base.pt", tmp_path)
    folder = tmp_path
    monkeypatch.setattr(warm, "WARM", dataclasses.replace(warm.WARM, members=2, steps=2, batch=8))
    monkeypatch.setattr(warm, "pairs_of", pairs_of)
    prompts, texts = task.split(MINIATURE)["prompts"][:3], ["1", "2", "33"]
    scores: list[list[float]] = []
    original = runs.objective_of

    def watch(*arguments: Any) -> Any:
        scores.append(arguments[5](prompts, texts))
        return original(*arguments)

    monkeypatch.setattr(runs, "objective_of", watch)
    tuning = runs.tuning_cells("J-BOND + WARM", MINIATURE)
    for cell in (*tuning, dataclasses.replace(tuning[0], contender="J-BOND + WARM + WARP", tuning=False)):
        figures = runs.run(cell, dataclasses.replace(MINIATURE, steps=4, every=2), folder)
        assert figures["prepared"] == warm.train_members(MINIATURE, folder)["seconds"] > 0
        assert figures["points"][0]["seconds"] > figures["prepared"]
    (cell,) = runs.cells("J-BOND + WARM", MINIATURE, folder, 1)
    runs.run(cell, MINIATURE, folder)
    members = warm.members_of(MINIATURE, folder)
    with torch.no_grad():
        expected = members.open("average")([(p.text, text) for p, text in zip(prompts, texts, strict=True)])
    assert all(score == expected.tolist() for score in scores) and len(set(expected.tolist())) == 3
    start = {key: [0.5] * 30 for key in ("sampled", "greedy", "kl")}
    report.report(MINIATURE, folder, report.rows(MINIATURE, folder, 1, start["sampled"]), start, tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    assert "the average of 2 reward models. They learned 40 pairs" in text and "of\n30 on the problems" in text
    assert all(f"- {name}: " in text for name in ("probe", "member 1", "member 2", "average"))


def test_what_is_measured(folder: Path) -> None:
    """A model is no distance from itself; another is further the more it differs, and exact match is of its answers."""
    base = task.trained_base(MINIATURE, folder)
    start, policy, prompts = Policy(base), Policy(base), task.split(MINIATURE)["unseen"]
    assert set(task.measure(policy, start, prompts, 2)["kl"]) == {0.0}
    with torch.no_grad():
        for weight in policy.weights.values():
            weight.mul_(1.5)
    figures = task.measure(policy, start, prompts, 8)
    assert np.mean(figures["kl"]) > 0.01 and set(figures["greedy"]) <= {0.0, 1.0}


def test_equal_time_lies_between_measurements() -> None:
    """What prepares a run is its time, and brings it no further."""
    points = [{"seconds": 2.0, "sampled": [0.5, 1.0]}, {"seconds": 4.0, "sampled": [1.0, 1.0]}]
    for seconds, expected in ((1.0, [0.25, 0.5]), (2.0, [0.5, 1.0]), (3.0, [0.75, 1.0]), (9.0, [1.0, 1.0])):
        assert report.sampled_at(seconds, {"prepared": 0.0, "points": points}, [0.0, 0.0]).tolist() == expected
    for seconds, expected in ((0.5, [0.0, 0.0]), (1.0, [0.0, 0.0]), (1.5, [0.25, 0.5])):
        assert report.sampled_at(seconds, {"prepared": 1.0, "points": points}, [0.0, 0.0]).tolist() == expected


def test_the_report_says_what_there_is(folder: Path, tmp_path: Path) -> None:
    start = {key: [0.5] * 30 for key in ("sampled", "greedy", "kl")}
    rows = report.rows(MINIATURE, folder, 2, start["sampled"])
    assert {row.contender: len(row.seen) for row in rows} == {"SFT": 1, "J-BOND": 2}
    report.report(MINIATURE, folder, rows, start, tmp_path)
    text, result = (tmp_path / "ablation.md").read_text(), json.loads((tmp_path / "ablation.json").read_text())
    assert "| J-BOND | 2 |" in text and "| SFT | 1 |" in text and "no order can be told" in text
    assert "Not run: best of 4, " in text and "J-BOND + WARM" in text and "## Reward models" not in text
    (row,) = (row for row in result["rows"] if row["contender"] == "J-BOND")
    done = [runs.run(cell, MINIATURE, folder) for cell in runs.cells("J-BOND", MINIATURE, folder, 2)]
    assert row["greedy"]["value"] == pytest.approx(np.mean([run["points"][-1]["greedy"] for run in done]))
    assert row["rate"] == runs.best_rate("J-BOND", MINIATURE, folder)


def test_a_tie_is_called_one() -> None:
    rows = [{"contender": name, "seeds": 5} for name in ("best", "near", "far")]
    below = {
        "near": {"value": -0.01, "low": -0.03, "high": 0.01},
        "far": {"value": -0.2, "low": -0.25, "high": -0.15},
    }
    lines = report._verdict(rows, below)
    assert lines[-2:] == ["- near: -0.010 (-0.030 to 0.010): a tie.", "- far: -0.200 (-0.250 to -0.150)."]
