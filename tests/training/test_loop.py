"""The loop: steps as PyTorch's own, parts are averaged, and a run goes on to the bit wherever it was stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from transom.errors import TrainingError
from transom.training.loop import Loop, LoopSettings, Loss, Metrics, Objective
from transom.training.state import TrainingState

SETTINGS = LoopSettings(steps=12, learning_rate=0.05, warmup=0.25, save_every=1)


class Regression(Objective):
    """Fits a line to noisy draws; the generator and a running mean are its state."""

    def __init__(self, *, parts: int = 2, spoiled_step: int | None = None) -> None:
        self.parts, self._spoiled_step = parts, spoiled_step
        self.parameters = {"weight": torch.zeros(3, requires_grad=True), "bias": torch.zeros(1, requires_grad=True)}
        self.average = torch.zeros(3)
        self._generator = torch.Generator().manual_seed(5)

    def losses(self, step: int) -> Iterator[Loss]:
        for _ in range(self.parts):
            x = torch.randn(4, 3, generator=self._generator)
            y = x @ self.parameters["weight"] + self.parameters["bias"]
            loss = (y - x.sum(-1) - 1).square().mean()
            yield Loss(
                value=loss * (float("nan") if step == self._spoiled_step else 1), metrics={"mean": float(x.mean())}
            )

    def rate(self, name: str, peak: float) -> float:
        return peak * (2 if name == "bias" else 1)

    def end_step(self) -> None:
        self.average.lerp_(self.parameters["weight"].detach(), 0.1)

    def state(self) -> dict[str, Any]:
        return {"average": self.average, "generator": self._generator.get_state()}

    def resume(self, state: dict[str, Any]) -> None:
        self.average.copy_(state["average"])
        self._generator.set_state(state["generator"])


def state_of(tmp_path: Path, settings: LoopSettings = SETTINGS) -> TrainingState:
    return TrainingState(tmp_path / "run", settings, "revision", "data")


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_adam_on_the_mean_of_the_parts() -> None:
    trained, plain = Regression(), Regression()
    metrics = Loop(trained, SETTINGS).run()
    optimizer = torch.optim.Adam([{"params": [p]} for p in plain.parameters.values()], betas=(0.9, 0.95), eps=1e-12)
    for step in range(12):
        for group, factor in zip(optimizer.param_groups, (1, 2), strict=True):
            group["lr"] = 0.05 * SETTINGS.shape(step) * factor
        optimizer.zero_grad()
        losses = [loss.value for loss in plain.losses(step)]
        (sum(losses) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
        assert metrics[step]["loss"] == pytest.approx(float(sum(losses).detach()) / 2)  # type: ignore[union-attr]
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(trained.parameters[name], parameter)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]


def test_the_rate_rises_and_falls() -> None:
    settings = dataclasses.replace(SETTINGS, steps=100, warmup=0.1, last_rate=0.2)
    shape = [settings.shape(step) for step in range(100)]
    assert shape[:3] == pytest.approx([0.1, 0.2, 0.3]) and shape[10] == 1
    assert sorted(shape[10:], reverse=True) == shape[10:] and shape[99] == pytest.approx(0.2, abs=1e-3)
    level = dataclasses.replace(settings, warmup=0.0, last_rate=1.0)
    assert [level.shape(step) for step in (0, 50, 99)] == [1, 1, 1]


def test_a_gradient_is_clipped() -> None:
    norms = {}
    for clip in (None, 0.01):
        objective = Regression(parts=1)
        loop = Loop(objective, dataclasses.replace(SETTINGS, steps=1, clip=clip))
        (metrics,) = loop.run()
        gradients = torch.cat([p.grad for p in objective.parameters.values() if p.grad is not None])
        norms[clip] = float(gradients.norm()), metrics["gradient_norm"]
    assert norms[0.01] == pytest.approx((0.01, norms[None][1]), rel=1e-4) and norms[None][0] == norms[None][1]


@pytest.mark.parametrize("stop", range(1, 12))
def test_it_goes_on_wherever_it_was_stopped(stop: int, tmp_path: Path) -> None:
    whole = Regression()
    expected = Loop(whole, SETTINGS).run()

    class StoppedError(Exception):
        pass

    def on_step(done: int, total: int, metrics: Metrics) -> None:
        if done == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        Loop(Regression(), SETTINGS, state=state_of(tmp_path), on_step=on_step).run()
    # A step that was under way when the run was stopped.
    state_of(tmp_path).log({"step": stop + 1, "loss": 9})
    state, again = state_of(tmp_path), Regression()
    assert Loop(again, SETTINGS, state=state, saved=state.load()).run() == expected
    for name, parameter in whole.parameters.items():
        assert torch.equal(again.parameters[name], parameter)
    assert torch.equal(again.average, whole.average)
    log = lines(tmp_path / ".run.metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, 13))
    assert [line["loss"] for line in log] == [metrics["loss"] for metrics in expected]
    state.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    state, objective = state_of(tmp_path), Regression(spoiled_step=6)
    with pytest.raises(TrainingError, match=r"the loss of step 7 is nan: try a smaller learning rate"):
        Loop(objective, SETTINGS, state=state).run()
    assert all(bool(parameter.isfinite().all()) for parameter in objective.parameters.values())
    assert len(lines(tmp_path / ".run.metrics.jsonl")) == 6
    saved = state.load()
    assert saved is not None and len(saved["metrics"]) == 6


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    state = state_of(tmp_path)
    Loop(Regression(), dataclasses.replace(SETTINGS, steps=2), state=state).run()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"cannot save the state of the run to .*No space left"):
        Loop(Regression(), SETTINGS, state=state).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.metrics.jsonl", ".run.training"]
