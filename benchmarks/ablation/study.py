"""The ablation's methods and their runs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ablation.task import (
    ANSWER,
    END,
    Study,
    answer_ids,
    decode,
    exact,
    frozen,
    measure,
    split,
    trained_base,
    write,
)
from benchmarks.ablation.warm import WARM, learned_reward, train_members
from transom.training.averaging import liti, slerp
from transom.training.loop import Loop, LoopSettings, Metrics, Objective, OnStep
from transom.training.objectives.alignment import Alignment, Method, Score
from transom.training.objectives.best_of_n import BestOfN
from transom.training.objectives.bond import Bond
from transom.training.objectives.dpo import Dpo
from transom.training.objectives.jbond import JBond
from transom.training.objectives.rloo import Rloo
from transom.training.objectives.rrhf import Rrhf
from transom.training.objectives.sft import Sft
from transom.training.policy import Policy
from transom.training.prompts import Prompt

ETA = 0.5
"""WARP's share of the way from a round's start to what its runs were merged to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the table.

    Attributes:
        method: What is learned from samples; None for right answers, of which nothing is sampled.
        moves: Whether the anchor moves after the policy.
        rounds: Of WARP; 0 for a plain run. The steps are shared by the runs of all rounds.
        runs: Of a round.
        warm: Whether the reward is learned: that of reward models that are averaged.
        note: In plain words.
    """

    method: Method | None
    moves: bool = False
    rounds: int = 0
    runs: int = 1
    warm: bool = False
    note: str


J_BOND = Contender(method=JBond(beta=0.5, gamma=0.0), moves=True, note="beta 0.5, gamma 0")

CONTENDERS: Mapping[str, Contender] = {
    "SFT": Contender(method=None, note="is shown right answers, which no other method sees"),
    "best of 4": Contender(method=BestOfN(samples=4), note="the best of four of the start"),
    "best of 4 (moving)": Contender(method=BestOfN(samples=4), moves=True, note="which is BOND's forward half, beta 0"),
    "RLOO": Contender(method=Rloo(samples=4, beta=0.02), note="four samples, KL to the start 0.02"),
    "BOND": Contender(method=Bond(n=4, samples=4, beta=0.5), moves=True, note="best of four, Jeffreys (beta 0.5)"),
    "J-BOND": J_BOND,
    "J-BOND + WARM": dataclasses.replace(
        J_BOND, warm=True, note=f"J-BOND with the reward of {WARM.members} reward models, averaged"
    ),
    "J-BOND + WARP": dataclasses.replace(
        J_BOND, rounds=2, runs=2, note="two rounds of two runs, of 40 steps each: SLERP, then half of the way (LITI)"
    ),
    "J-BOND + WARM + WARP": dataclasses.replace(
        J_BOND, warm=True, rounds=2, runs=2, note="the same rounds with the same learned reward"
    ),
    "DPO": Contender(method=Dpo(samples=4, beta=0.3), moves=True, note="best against worst of four, beta 0.3"),
    "RRHF": Contender(method=Rrhf(samples=4), moves=True, note="ranks four"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        contender: A key of `CONTENDERS`.
        rate: Learning rate.
        seed: Of the order of prompts, and of draws.
        tuning: Whether it only compares learning rates.
    """

    contender: str
    rate: float
    seed: int
    tuning: bool

    def path(self, folder: Path) -> Path:
        """Where its figures are."""
        kind = "tuning" if self.tuning else "run"
        return folder / f"{kind} {self.contender} {self.rate:g} {self.seed}.json".replace(" ", "_")


def objective_of(
    contender: Contender,
    study: Study,
    policy: Policy,
    anchor: Policy,
    prompts: list[Prompt],
    score: Score,
    seed: int,
) -> Objective:
    """What a step does, with as many samples or answers as every other contender."""
    method = contender.method
    if method is None:
        answers = [answer_ids(prompt.reference["answer"]) for prompt in prompts]
        return Sft(policy, prompts, answers, batch=study.samples, seed=seed)
    return Alignment(
        policy, anchor, method, prompts, score, decode=decode, stops=frozenset({END}),
        batch=study.samples // (method.own + method.anchored), max_new=ANSWER,
        anchor_rate=study.anchor_rate if contender.moves else 0.0, seed=seed,
    )  # fmt: skip


def train(
    contender: Contender,
    study: Study,
    policy: Policy,
    anchor: Policy,
    prompts: list[Prompt],
    score: Score,
    cell: Cell,
    steps: int,
    on_step: OnStep,
) -> None:
    """Train the policy; the anchor is where it begins. Of WARP only merged models are told to `on_step`."""
    # A rate that does not fall: what is measured on the way is what a shorter run would give.
    settings = LoopSettings(steps=steps, learning_rate=cell.rate, warmup=1 / 8, last_rate=1.0, clip=1.0)
    if not contender.rounds:
        objective = objective_of(contender, study, policy, anchor, prompts, score, cell.seed)
        Loop(objective, settings, on_step=on_step).run()
        return
    runs, of_round = contender.runs, steps // contender.rounds
    settings = dataclasses.replace(settings, steps=of_round // runs)
    begin = {name: weight.detach().clone() for name, weight in policy.weights.items()}
    for round in range(contender.rounds):
        ends: list[dict[str, torch.Tensor]] = []
        metrics: Metrics = {}
        for index in range(runs):
            for one in (policy, anchor):
                put(one, begin)
            seed = (cell.seed * contender.rounds + round) * runs + index
            objective = objective_of(contender, study, policy, anchor, prompts, score, seed)
            metrics = Loop(objective, settings).run()[-1]
            ends.append({name: weight.detach().clone() for name, weight in policy.weights.items()})
        for name, first in begin.items():
            merged = first + slerp([end[name] - first for end in ends])
            begin[name] = liti(first, merged, ETA)
        put(policy, begin)
        on_step((round + 1) * of_round, steps, metrics)


@torch.no_grad()
def put(policy: Policy, weights: Mapping[str, torch.Tensor]) -> None:
    """Set a policy's weights."""
    for name, weight in policy.weights.items():
        weight.copy_(weights[name])


def run(cell: Cell, study: Study, folder: Path) -> dict[str, Any]:
    """A run's figures, from its file once there is one."""
    path = cell.path(folder)
    if path.exists():
        figures: dict[str, Any] = json.loads(path.read_text())
        return figures
    torch.set_num_threads(1)
    base, data = trained_base(study, folder), split(study)
    policy, anchor, start = Policy(base), Policy(base, trained=frozen), Policy(base, trained=frozen)
    contender, steps = CONTENDERS[cell.contender], study.tuning_steps if cell.tuning else study.steps
    points: list[dict[str, Any]] = []
    score: Score = exact
    prepared = 0.0
    if contender.warm:
        prepared = train_members(study, folder)["seconds"]
        score = learned_reward(study, folder)
    # Measuring is not the method's time; its reward models are.
    began, measuring = time.process_time() - prepared, 0.0

    def on_step(done: int, total: int, metrics: Metrics) -> None:
        nonlocal measuring
        at = time.process_time()
        if done == total or (not cell.tuning and done % study.every == 0):
            figures = measure(policy, start, data["tuning" if cell.tuning else "unseen"], study.draws)
            points.append({"step": done, "seconds": at - began - measuring, **figures})
        measuring += time.process_time() - at

    train(contender, study, policy, anchor, data["prompts"], score, cell, steps, on_step)
    seen = [] if cell.tuning else measure(policy, start, data["prompts"][:1000], 1)["sampled"]
    figures = {**dataclasses.asdict(cell), "prepared": prepared, "points": points, "seen": seen}
    write(path, lambda draft: draft.write_text(json.dumps(figures)))
    return figures


def best_rate(contender: str, study: Study, folder: Path) -> float | None:
    """The learning rate with the highest exact match of samples on the tuning problems; None if one was not run."""
    scores = {}
    for cell in tuning_cells(contender, study):
        if not cell.path(folder).exists():
            return None
        scores[cell.rate] = float(np.mean(run(cell, study, folder)["points"][-1]["sampled"]))
    return max(scores, key=scores.__getitem__)


def tuning_cells(contender: str, study: Study) -> list[Cell]:
    """Runs that compare learning rates. Their seed is none of the table's."""
    return [Cell(contender=contender, rate=rate, seed=1000, tuning=True) for rate in study.rates]


def cells(contender: str, study: Study, folder: Path, seeds: int) -> list[Cell]:
    """A contender's runs, once its rate is known."""
    rate = best_rate(contender, study, folder)
    if rate is None:
        return []
    return [Cell(contender=contender, rate=rate, seed=seed, tuning=False) for seed in range(seeds)]


def run_all(todo: Sequence[Cell], study: Study, folder: Path, jobs: int) -> None:
    """Runs that are not there yet, a few at a time."""
    left = [cell for cell in todo if not cell.path(folder).exists()]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, cell, study, folder): cell for cell in left}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            point, cell = future.result()["points"][-1], futures[future]
            print(
                f"{done} of {len(left)}: {cell.path(folder).stem}: sampled {np.mean(point['sampled']):.3f}, greedy "
                f"{np.mean(point['greedy']):.3f}, {point['seconds']:.0f} s",
                flush=True,
            )
