"""The loop that every kind of training shares: rates, accumulation, saving, resuming, metrics.

What is trained and what a step loses is the objective's. A run that is stopped at any step goes on where it was last
saved, and ends with the same weights to the bit.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from transom.errors import TrainingError
from transom.training.parallel import ONE, Shards, started
from transom.training.state import TrainingState

Metrics = Mapping[str, float]
"""Of a step, by name; `loss` is one of them."""

_VALUE, _STEP = "value", "step"
"""Of a parameter's tensors in a saved state: itself, and what Adam counts. Others are Adam's moments."""

OnStep = Callable[[int, int, Metrics], None]
"""Called after every step with (steps done, steps in all, its metrics)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What a part of a step loses.

    Attributes:
        value: A scalar with a gradient.
        metrics: What else is worth a look, by name.
    """

    value: torch.Tensor
    metrics: Metrics = dataclasses.field(default_factory=dict)


class Objective(abc.ABC):
    """What is trained, and what it loses.

    Attributes:
        parameters: Leaf tensors that take gradients, by name.
        parts: In how many parts a step's batch goes through the model; its gradient is their mean.
        shards: Where the parameters are, and whose parts are whose.
    """

    parameters: Mapping[str, torch.Tensor]
    parts: int = 1
    shards: Shards = ONE

    @abc.abstractmethod
    def losses(self, step: int) -> Iterator[Loss]:
        """This process's parts of a step, counted from 0. The loop goes back through each before it takes the next."""

    def rate(self, name: str, peak: float) -> float:
        """Highest learning rate of a parameter, where the run's is `peak`."""
        del name
        return peak

    def end_step(self) -> None:  # noqa: B027
        """Called when the parameters have been changed, to move what follows them."""

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, besides the parameters: tensors, numbers, lists and dicts of them."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take up a state; the parameters have been set already."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the optimiser steps: Adam, at a rate that warms up and then falls on a cosine.

    Attributes:
        steps: Of the optimiser.
        learning_rate: At its peak.
        warmup: Share of the steps in which the rate rises.
        last_rate: Share of the peak that is left at the end; 1 for a rate that does not fall.
        betas: Adam's.
        epsilon: Adam's.
        clip: Largest norm of a step's gradient; None for any.
        save_every: Steps between two saved states.
    """

    steps: int
    learning_rate: float
    warmup: float = 1 / 30
    last_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-12
    clip: float | None = None
    save_every: int = 50

    def shape(self, step: int) -> float:
        """Share of the peak rate at a step, counted from 0."""
        rising = max(1, round(self.steps * self.warmup))
        progress = max(0.0, (step - rising) / max(1, self.steps - rising))
        falling = (1 + self.last_rate) / 2 + (1 - self.last_rate) / 2 * math.cos(math.pi * progress)
        return min(1.0, (step + 1) / rising) * falling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the settings of runs that learn from examples have in common.

    Attributes:
        steps: Of the optimiser.
        batch: Examples in a step.
        parts: In how many parts they go through the model.
        warmup: Share of the steps in which the rate rises.
        last_rate: Share of the peak that is left at the end.
        clip: Largest norm of a step's gradient.
        recompute: Compute every layer again on the way back: memory for time.
        seed: Of the order of examples, and of draws.
        device: Where to compute.
        save_every: Steps between two saved states.

    Raises:
        TrainingError: If a count is below 1, or the parts of a batch are not equal.
    """

    steps: int = 500
    batch: int = 16
    parts: int = 1
    warmup: float = 0.05
    last_rate: float = 1.0
    clip: float = 1.0
    recompute: bool = False
    seed: int = 0
    device: str = "cpu"
    save_every: int = 50

    def __post_init__(self) -> None:
        self.check_counts("steps", "batch", "parts", "save_every")
        if self.batch % self.parts:
            raise TrainingError(f"a batch of {self.batch} does not go into {self.parts} equal parts: choose others")

    def check_counts(self, *names: str) -> None:
        """Raise `TrainingError` if one of these settings is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}: give 1 or more")

    def loop_at(self, rate: float) -> LoopSettings:
        """How the optimiser steps, with a learning rate at its peak."""
        return LoopSettings(
            steps=self.steps,
            learning_rate=rate,
            warmup=self.warmup,
            last_rate=self.last_rate,
            clip=self.clip,
            save_every=self.save_every,
        )


class Loop:
    """An objective's run.

    Args:
        objective: What is trained.
        settings: How.
        state: Where the run is saved; None for a run that is not.
        saved: What `state.load` returned: where to go on.
        on_step: Told of every step, on the first process.

    Attributes:
        metrics: Of every step so far, over all processes.

    Raises:
        TrainingError: If the objective cannot be shared by the processes that there are.
    """

    def __init__(
        self,
        objective: Objective,
        settings: LoopSettings,
        *,
        state: TrainingState | None = None,
        saved: dict[str, Any] | None = None,
        on_step: OnStep = lambda done, total, metrics: None,
    ) -> None:
        self.objective, self.settings, self._state, self._on_step = objective, settings, state, on_step
        self._shards = objective.shards
        if started() != self._shards.count:
            raise TrainingError("this kind of training runs in one process: start it without torchrun")
        if objective.parts % self._shards.count:
            raise TrainingError(
                f"the {objective.parts} parts of a step don't go evenly into {self._shards.count} processes: choose "
                "another number of sequences (distill: --batch) or parts (align: `parts` in a recipe)"
            )
        self.metrics: list[Metrics] = []
        self._optimizer = torch.optim.Adam(
            [{"params": [parameter], "name": name} for name, parameter in objective.parameters.items()],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
        )
        if saved is not None:
            self._resume(saved)
        if state is not None:
            state.begin_log(self.metrics)

    def run(self) -> list[Metrics]:
        """Take the steps that are left; returns the metrics of all.

        Raises:
            TrainingError: If a loss or a gradient is not finite, or the state cannot be saved.
        """
        total = self.settings.steps
        for step in range(len(self.metrics), total):
            began = time.perf_counter()
            metrics = self._step(step)
            self.metrics.append(metrics)
            if self._state is not None:
                self._state.log({"step": step + 1, **metrics, "seconds": time.perf_counter() - began})
                if (step + 1) % self.settings.save_every == 0 and step + 1 < total:
                    self._state.save(self._saved())
            if self._shards.is_first:
                self._on_step(step + 1, total, metrics)
        return self.metrics

    def _step(self, step: int) -> Metrics:
        objective, settings = self.objective, self.settings
        shape = settings.shape(step)
        for group in self._optimizer.param_groups:
            group["lr"] = shape * objective.rate(group["name"], settings.learning_rate)
        self._optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        parts = objective.parts // self._shards.count
        for loss in objective.losses(step):
            (loss.value / parts).backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": float(loss.value.detach()), **loss.metrics}.items():
                totals[name] = totals.get(name, 0.0) + value / parts
        gradients = [p.grad for p in objective.parameters.values() if p.grad is not None]
        norm = self._shards.whole(torch.nn.utils.get_total_norm(gradients))
        totals = self._shards.mean(totals)
        totals["gradient_norm"] = float(norm)
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(totals[name]):
                raise TrainingError(
                    f"the {name.replace('_', ' ')} of step {step + 1} is {totals[name]}: try a smaller learning rate"
                )
        if settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(objective.parameters.values(), settings.clip, norm)
        self._optimizer.step()
        if any(parameter.device.type == "xla" for parameter in objective.parameters.values()):
            importlib.import_module("torch_xla").sync()
        objective.end_step()
        return totals

    def _saved(self) -> dict[str, Any]:
        tensors = {}
        for name, parameter in self.objective.parameters.items():
            tensors[f"{name}/{_VALUE}"] = parameter.detach()
            # Of a parameter that never had a gradient there are no moments.
            tensors |= {f"{name}/{key}": tensor for key, tensor in self._optimizer.state.get(parameter, {}).items()}
        return {
            "tensors": tensors,
            "objective": self.objective.state(),
            "metrics": self.metrics,
        }

    def _resume(self, saved: dict[str, Any]) -> None:
        indices = {name: index for index, name in enumerate(self.objective.parameters)}
        moments: dict[int, dict[str, torch.Tensor]] = {index: {} for index in indices.values()}
        with torch.no_grad():
            for key, tensor in saved["tensors"].items():
                name, _, part = key.rpartition("/")
                if part == _VALUE:
                    self.objective.parameters[name].copy_(self._shards.shard(tensor))
                else:
                    moments[indices[name]][part] = tensor if part == _STEP else self._shards.shard(tensor)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        self.objective.resume(saved["objective"])
        self.metrics = list(saved["metrics"])
