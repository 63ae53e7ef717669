"""WARP (arXiv 2406.16768): rounds of runs from one start, whose weights are merged to begin the next round.

Every run learns from rewards with an order of prompts, draws and an anchor of its own. What the runs added to the start
is interpolated on a sphere, tensor by tensor, and the next start lies the share `eta` of the way to it. One run a round
has nothing to interpolate with: only that last step is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from transom.training.averaging import Average
from transom.training.loop import LoopSettings, Objective
from transom.training.runs import Runs
from transom.zoo.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarpSettings:
    """How often and how many.

    Attributes:
        rounds: How often runs are merged.
        runs: In a round.
        eta: Share of the way from a round's start to what its runs are merged to.
        seed: Of the whole; every run has its own.
    """

    rounds: int
    runs: int
    eta: float
    seed: int

    def seed_of(self, round: int, run: int) -> int:
        """The seed of a run, counted from 0; those of two wholes of the same shape have no run in common."""
        return (self.seed * self.rounds + round) * self.runs + run


def warp(
    model: Model,
    settings: WarpSettings,
    runs: Runs,
    loop: LoopSettings,
    objective: Callable[[Model, int], Objective],
) -> tuple[Model, list[dict[str, Any]]]:
    """Train and merge.

    Args:
        model: Where it begins.
        settings: How.
        runs: Where runs are kept; the result is read from there.
        loop: How each run steps.
        objective: Makes a run's objective of its start and seed. Its parameters have the names of the model's weights.

    Returns:
        The last start, and what was done in each round.
    """
    count = settings.runs
    average = Average.of("warp" if count > 1 else "liti", count, eta=settings.eta)
    starts = [f"start-{round + 1}" for round in range(settings.rounds)]
    # Those before the last one are forgotten.
    over = max((round + 1 for round, name in enumerate(starts) if runs.has(name)), default=0)
    start, report = model, []
    for round, merged in enumerate(starts):
        names = [f"round-{round + 1}-run-{run + 1}" for run in range(count)]
        seeds = [settings.seed_of(round, run) for run in range(count)]
        for run, (name, seed) in enumerate(zip(names, seeds, strict=True)):
            labels = {"round": round + 1, "run": run + 1}

            def create(start: Model = start, seed: int = seed) -> Objective:
                return objective(start, seed)

            runs.train(name, create, loop, labels, merged=round < over)
        if round >= over:
            runs.merge(merged, average, names, start.weights)
        runs.forget(*names, *starts[:round])
        if runs.has(merged):
            start = dataclasses.replace(model, weights={**model.weights, **runs.weights(merged)}, quant="none")
        report.append({"round": round + 1, "seeds": seeds, "median_angle_degrees": runs.note(merged)})
    return start, report
