"""Windows that are learned: within the budget, the likeliest ones, and a run that goes on to the bit."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import FP32_LOGITS
from transom.errors import TrainingError
from transom.passes.gate_windows import GATES
from transom.training.loop import Loop
from transom.training.objectives.windows import LearnWindows, WindowSettings, harden
from transom.training.state import TrainingState
from transom.zoo.model import Model, load

SETTINGS = WindowSettings(
    windows=(4, 16, 0), budget=0.5, context=64, steps=10, batch=4, learning_rate=1e-3, gate_rate=0.5, save_every=1
)


@pytest.fixture(scope="module")
def model() -> Model:
    """Three layers that are all global."""
    return load("llama3-tiny")


@pytest.fixture(scope="module")
def sequences() -> torch.Tensor:
    """Longer than three of the windows."""
    return torch.randint(0, 500, (16, 3 * 16 + 5), generator=torch.Generator().manual_seed(0))


def test_hard_windows_are_the_likeliest_within_the_budget() -> None:
    windows, slots = (4, 16, 0), (4, 16, 64)
    draw = torch.Generator().manual_seed(0)
    for budget in (0.0625, 0.1, 0.3, 0.55, 1.0):
        log_shares = torch.randn(5, 3, generator=draw).log_softmax(-1)
        allowed = [
            choice
            for choice in itertools.product(range(3), repeat=5)
            if sum(slots[i] for i in choice) <= budget * 5 * 64
        ]
        best = max(allowed, key=lambda choice: sum(float(row[i]) for row, i in zip(log_shares, choice, strict=True)))
        assert harden(log_shares, windows, slots, budget) == tuple(windows[index] for index in best)


def test_windows_are_global_then_mixed_then_fixed(model: Model, sequences: torch.Tensor) -> None:
    run = LearnWindows(model, SETTINGS, sequences)
    ids = sequences[:2]
    logits = run.head.logits(run.hidden(ids))
    assert (logits - model.eager()(ids, torch.tensor(0), None)[0]).abs().max() < FP32_LOGITS
    loop = Loop(run, SETTINGS.loop)
    loop.run()
    slots = [metrics["slots"] for metrics in loop.metrics]
    first, last = SETTINGS.gate_steps.start, SETTINGS.gate_steps.stop
    assert slots[:first] == [1.0] * first
    assert all(later < earlier for earlier, later in itertools.pairwise(slots[first:last]))
    assert run.windows is not None and len(run.windows) == 3 and set(run.windows) <= set(SETTINGS.windows)
    chosen = sum(window or SETTINGS.context for window in run.windows) / (3 * SETTINGS.context)
    assert chosen <= SETTINGS.budget and slots[last:] == [pytest.approx(chosen)] * (SETTINGS.steps - last)
    assert run.learned.keys() == model.weights.keys()


def test_fixed_windows_are_not_learned(model: Model, sequences: torch.Tensor) -> None:
    run = LearnWindows(model, SETTINGS, sequences, windows=(4, 0, 16))
    Loop(run, SETTINGS.loop).run()
    assert run.windows == (4, 0, 16)
    assert not any(tensor.any() for name, tensor in run.parameters.items() if name.endswith(GATES))


@pytest.mark.parametrize("stopped", [2, 5, 8])
def test_a_stopped_run_goes_on_to_the_bit(stopped: int, model: Model, sequences: torch.Tensor, tmp_path: Path) -> None:
    """While windows are global, while they are mixed, and when they are fixed."""
    whole = LearnWindows(model, SETTINGS, sequences)
    Loop(whole, SETTINGS.loop).run()

    def stop(done: int, total: int, metrics: Any) -> None:
        if done == stopped:
            raise KeyboardInterrupt

    state = TrainingState(tmp_path / "run", SETTINGS, "model", "text")
    with pytest.raises(KeyboardInterrupt):
        Loop(LearnWindows(model, SETTINGS, sequences), SETTINGS.loop, state=state, on_step=stop).run()
    again = LearnWindows(model, SETTINGS, sequences)
    Loop(again, SETTINGS.loop, state=state, saved=state.load()).run()
    assert again.windows == whole.windows
    for name, tensor in whole.parameters.items():
        assert torch.equal(again.parameters[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (16, 4, 0)}, "rising order"),
        ({"windows": (4, 64, 0)}, "shorter than the context"),
        ({"windows": (0,)}, "at least two"),
        ({"budget": 0.05}, "every layer has the shortest window"),
        ({"budget": 1.5}, "all are global"),
        ({"gates_from": 0.7}, "rising shares"),
        ({"parts": 3}, "3 parts divide a batch of 4"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        dataclasses.replace(SETTINGS, **changes)
