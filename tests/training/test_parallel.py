"""Several processes: the numbers of one, half of its bytes each, runs that change their number, errors that end all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tolerances import PARALLEL_LOSSES, PARALLEL_WEIGHTS
from tests.training.parallel_runs import FULL, begin, models, results
from tests.training.test_loop import SETTINGS, Regression
from transom.errors import TrainingError
from transom.training.distill import distill
from transom.training.loop import Loop
from transom.training.parallel import processes
from transom.zoo.model import load

WAIT = 240
"""Seconds until processes are ended that should have ended long before, on a busy machine too."""


def start(arguments: list[str], count: int = 2) -> list[tuple[int, str, str]]:
    """Run a module in several processes, in the environment that torchrun gives them; exit code, output, errors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=WAIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def close(first: Any, second: Any) -> bool:
    """Whether losses agree."""
    return bool(torch.allclose(torch.tensor(first), torch.tensor(second), rtol=PARALLEL_LOSSES, atol=PARALLEL_LOSSES))


def difference(first: Path, second: Path) -> float:
    """Largest of the weights of two checkpoints."""
    one, two = load(first).weights, load(second).weights
    assert one.keys() == two.keys()
    return max(float((one[name].read() - weight.read()).abs().max()) for name, weight in two.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, prompts, and a run that one process began."""
    path = tmp_path_factory.mktemp("parallel")
    words = "A local layer sees a window; a global one sees all that came before it. "
    (path / "text.txt").write_text(words * 20)
    (path / "other.txt").write_text(words * 21)
    lines = [{"prompt": "ab" * count, "answer": "xyz"[:count], "instructions": []} for count in (1, 2, 3)]
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))

    begin(path, path / "from-one")
    return path


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process gives."""
    return results(folder, folder / "one")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes gives."""
    for code, _, errors in start(["tests.training.parallel_runs", str(folder)]):
        assert code == 0, errors
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["full", "samples", "sft"])
def test_two_processes_are_as_one(name: str, folder: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Losses of every step on every process, and norms of the gradients; the checkpoint, files and all."""
    assert all(close(seen[name], one[name]) for seen in two)
    first, second = folder / "one" / name, folder / "two" / name
    assert difference(first, second) < PARALLEL_WEIGHTS
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(one[name]) + 1))
    assert not list((folder / "two").glob(f".{name}.*"))


def test_gradients(folder: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Of every parameter, after the first step."""
    first, second = (load_file(folder / name / "gradients") for name in ("one", "two"))
    assert first.keys() == second.keys() and len(first) > 20
    for name, gradient in first.items():
        assert float((second[name] - gradient).abs().max()) < PARALLEL_LOSSES * max(1.0, float(gradient.abs().max()))


def test_each_keeps_half(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Of weights and of Adam's moments, in storage, not in shape alone."""
    assert one["shares"] == [1, 1]
    for seen in two:
        low, high = seen["shares"]
        assert 0.49 < low <= high < 0.52


def test_a_run_goes_on_in_another_number_of_processes(
    folder: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    """Saved after two steps by one and taken up by two, and the other way round; those steps are not taken again."""
    assert close(two[0]["from one"], one["full"])
    assert difference(folder / "one" / "full", folder / "from-one") < PARALLEL_WEIGHTS
    assert not (folder / "from-two").exists()
    assert [path.name for path in folder.glob(".from-two.training.step-*")] == [".from-two.training.step-2"]
    assert close(distill(*models(), FULL, text=folder / "text.txt", out=folder / "from-two"), one["full"])
    assert difference(folder / "one" / "full", folder / "from-two") < PARALLEL_WEIGHTS
    assert not list(folder.glob(".from-*"))
    for name in ("from-one", "from-two"):
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert ["seconds" in line for line in lines] == [False, False, True]


def test_what_is_refused(folder: Path, two: list[dict[str, Any]]) -> None:
    """By all processes alike."""
    assert two[0]["refused"] == two[1]["refused"]
    odd, online, sampled, other, unwritten = two[0]["refused"]
    assert "3 parts of a step don't go evenly into 2 processes" in odd
    assert "leave out --online" in online and "by sft alone" in sampled
    assert "don't see the same" in other
    assert "cannot save the state of the run" in unwritten and "text.txt" in unwritten


def test_an_error_of_one_ends_all(folder: Path, two: list[dict[str, Any]]) -> None:
    """Nothing is left of runs that failed."""
    assert two[1]["ended"] == "the second process cannot go on"
    assert "another process of the run has ended" in two[0]["ended"]
    assert sorted(path.name for path in (folder / "two").iterdir() if path.name[0] != ".") == [
        "drawn", "full", "gradients", "samples", "sft",
    ]  # fmt: skip


def test_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of training that are not spread, devices that have no group, and no torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="runs in one process: start it without torchrun"):
        Loop(Regression(), SETTINGS)
    with pytest.raises(TrainingError, match="not 'xla': start one process"), processes("xla"):
        pass
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TrainingError, match="start them with torchrun"), processes("cpu"):
        pass


@pytest.mark.slow
def test_the_command(folder: Path) -> None:
    """Started by torchrun; one process tells the result."""
    arguments = ["distill", "gemma3-tiny", "--teacher", "gemma3-tiny", "--data", str(folder / "text.txt")]
    arguments += ["--length", "16", "--batch", "2", "--steps", "2", "--json", "-o", str(folder / "command")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "transom", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["loss"]) == 2 and load(folder / "command")
