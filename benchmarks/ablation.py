"""Every alignment method on one small task: sums of one- and two-digit numbers, a Gemma 3 of two layers.

    python -m benchmarks.ablation --jobs 2 --out benchmarks/results

A base model learns sums of which 55% are wrong in ways that people get sums wrong: it mostly knows the right answer and
seldom samples it, so there is something for a reward to do. Then every method gets as many samples, and the same
reward: exact match. Problems are split before anything is trained; those that are measured stood in no training.

Every run is written when it is done, so the same command goes on from there; the report is of what there is.

Axes: S seeds, P problems.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transom.compiler import versions
from transom.graphs.weight import Weight
from transom.training.averaging import liti, slerp
from transom.training.loop import Loop, LoopSettings, Metrics, Objective, OnStep
from transom.training.objectives.alignment import Alignment, Method
from transom.training.objectives.best_of_n import BestOfN
from transom.training.objectives.bond import Bond
from transom.training.objectives.dpo import Dpo
from transom.training.objectives.jbond import JBond
from transom.training.objectives.rloo import Rloo
from transom.training.objectives.rrhf import Rrhf
from transom.training.objectives.sft import Sft
from transom.training.policy import Policy
from transom.training.prompts import Prompt, continued
from transom.training.state import TrainingState
from transom.training.text import order
from transom.validation.evaluation.statistics import Estimate, estimate_runs
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.config import tile
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.model import Model
from transom.zoo.rope import Rope

CHARACTERS = " 0123456789+-*=\n"
END = CHARACTERS.index("\n")
PROMPT, ANSWER = 6, 4
"""Characters. Prompts are padded in front, so that all are run together; an answer has its end in it."""

LARGEST = 99
"""Of the numbers that are added or subtracted."""

ETA = 0.5
"""WARP's share of the way from a round's start to what its runs were merged to."""

ENOUGH_SEEDS = 5
"""With fewer, the report puts no method before another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """All numbers that results depend on.

    Attributes:
        splits: Distinct problems of each.
        wrong: Share of wrong answers that the base model learns from.
        answers: That the base model sees of a problem.
        base_steps: That it learns.
        base_rate: Its learning rate.
        steps: Of a method's run.
        tuning_steps: Of a run that only compares learning rates.
        samples: In a step.
        rates: Learning rates that are tried.
        every: Steps between two measurements.
        draws: Samples of a problem that is measured.
        anchor_rate: Of the anchors that move.
    """

    splits: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"base": 14_500, "prompts": 3_000, "tuning": 1_000, "unseen": 1_500}
    )
    wrong: float = 0.55
    answers: int = 9
    base_steps: int = 2000
    base_rate: float = 4e-3
    steps: int = 160
    tuning_steps: int = 80
    samples: int = 192
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    every: int = 40
    draws: int = 2
    anchor_rate: float = 0.02

    @property
    def digest(self) -> str:
        """Runs of other numbers go to another folder; but for rates, which every run's file names."""
        numbers = {name: value for name, value in dataclasses.asdict(self).items() if name != "rates"}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:8]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the table.

    Attributes:
        method: What is learned from samples; None for right answers, of which nothing is sampled.
        moves: Whether the anchor moves after the policy.
        rounds: Of WARP; 0 for a plain run. The steps are shared by the runs of all rounds.
        runs: Of a round.
        note: In plain words.
    """

    method: Method | None
    moves: bool = False
    rounds: int = 0
    runs: int = 1
    note: str


CONTENDERS: Mapping[str, Contender] = {
    "SFT": Contender(method=None, note="is shown right answers, which no other method sees"),
    "best of 4": Contender(method=BestOfN(samples=4), note="the best of four of the start"),
    "best of 4 (moving)": Contender(method=BestOfN(samples=4), moves=True, note="which is BOND's forward half, beta 0"),
    "RLOO": Contender(method=Rloo(samples=4, beta=0.02), note="four samples, KL to the start 0.02"),
    "BOND": Contender(method=Bond(n=4, samples=4, beta=0.5), moves=True, note="best of four, Jeffreys (beta 0.5)"),
    "J-BOND": Contender(method=JBond(beta=0.5, gamma=0.0), moves=True, note="beta 0.5, gamma 0"),
    "J-BOND + WARP": Contender(
        method=JBond(beta=0.5, gamma=0.0),
        moves=True,
        rounds=2,
        runs=2,
        note="two rounds of two runs, of 40 steps each: SLERP, then half of the way (LITI)",
    ),
    "DPO": Contender(method=Dpo(samples=4, beta=0.3), moves=True, note="best against worst of four, beta 0.3"),
    "RRHF": Contender(method=Rrhf(samples=4), moves=True, note="ranks four"),
}
MISSING = ("J-BOND + WARM", "J-BOND + WARM + WARP")
"""Rows that belong to the table and have no code here yet."""


def problems() -> list[Prompt]:
    """All there are."""
    numbers = range(LARGEST + 1)
    questions = [(f"{a}{sign}{b}=", a + b if sign == "+" else a - b) for sign in "+-" for a in numbers for b in numbers]
    return [
        Prompt(text=text, ids=tuple(map(CHARACTERS.index, text.rjust(PROMPT))), reference={"answer": str(answer)})
        for text, answer in questions
    ]


def split(study: Study) -> dict[str, list[Prompt]]:
    """Distinct problems for each use."""
    everything = problems()
    places, result, start = order(len(everything), 0).tolist(), {}, 0
    for name, count in study.splits.items():
        result[name] = [everything[place] for place in places[start : start + count]]
        start += count
    if start > len(everything):
        raise ValueError(f"splits of {start:,} problems: there are only {len(everything):,}")
    return result


def slip(answer: int, draw: random.Random) -> int:
    """A wrong answer: a carry forgotten, one off, the sign lost, or digits swapped."""
    while True:
        swapped = int(str(abs(answer))[::-1])
        kinds = (answer + draw.choice((-10, 10)), answer + draw.choice((-1, 1)), -answer, swapped)
        wrong = draw.choice(kinds)
        if wrong != answer and len(str(wrong)) < ANSWER:
            return wrong


def answer_ids(answer: str) -> list[int]:
    """An answer with its end, as tokens."""
    return [*map(CHARACTERS.index, answer), END]


def decode(ids: Sequence[int]) -> str:
    """Tokens as text."""
    return "".join(CHARACTERS[id] for id in ids)


def exact(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """The reward: 1 for the right answer, 0 for any other."""
    return [float(text == prompt.reference["answer"]) for prompt, text in zip(prompts, texts, strict=True)]


def untrained() -> Model:
    """A local and a global layer; the window is shorter than a problem with its answer."""
    config = Gemma3Config(
        name="sums", vocab_size=len(CHARACTERS), hidden_size=64, intermediate_size=256, num_heads=4, num_kv_heads=2,
        head_dim=16, layer_kinds=tile("LG", 2), window=6, rope_local=Rope(theta=100.0), rope_global=Rope(theta=1e4),
        attention_scale=16**-0.5, context=64,
    )  # fmt: skip
    return Model(config=config, weights=random_weights(config, 0), tokenizer=None, source="random", revision="seed 0")


def trained_base(study: Study, folder: Path) -> Model:
    """The base model, from its file once there is one; its training goes on where it was stopped."""
    path, model = folder / "base.pt", untrained()
    if path.exists():
        tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
        return dataclasses.replace(model, weights={name: Weight.of(t, "base") for name, t in tensors.items()})
    draw, prompts, answers = random.Random(0), [], []
    for prompt in split(study)["base"] * study.answers:
        answer = int(prompt.reference["answer"])
        prompts.append(prompt)
        answers.append(answer_ids(str(slip(answer, draw) if draw.random() < study.wrong else answer)))
    policy = Policy(model)
    objective = Sft(policy, prompts, answers, batch=study.samples)
    settings = LoopSettings(steps=study.base_steps, learning_rate=study.base_rate, clip=1.0, save_every=200)
    state = TrainingState(folder / "base", settings, model.revision, study.digest)

    def on_step(done: int, total: int, metrics: Metrics) -> None:
        if done % 100 == 0:
            print(f"base model, step {done} of {total}: {metrics['loss']:.3f}", flush=True)

    Loop(objective, settings, state=state, saved=state.load(), on_step=on_step).run()
    write(path, lambda draft: torch.save({name: t.detach() for name, t in policy.weights.items()}, draft))
    state.remove()
    return policy.model()


def write(path: Path, save: Callable[[Path], object]) -> None:
    """A file that is there only when it is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save(draft)
    draft.replace(path)


def measure(policy: Policy, start: Policy, prompts: Sequence[Prompt], draws: int) -> dict[str, list[float]]:
    """Of every problem: exact match of samples (their share) and of the likeliest answer, KL to the start in nats."""
    ids, stops = [prompt.ids for prompt in prompts], frozenset({END})
    greedy = policy.sample(ids, max_new=ANSWER, stops=stops, temperature=0)
    repeated = [prompt for prompt in prompts for _ in range(draws)]
    generator = torch.Generator().manual_seed(0)
    sampled = policy.sample([prompt.ids for prompt in repeated], max_new=ANSWER, stops=stops, generator=generator)
    tokens_BT, counts_BT = continued(repeated, sampled)
    with torch.no_grad():
        ratios = (policy.log_probs(tokens_BT, counts_BT) - start.log_probs(tokens_BT, counts_BT)).sum(-1)
    rewards = torch.tensor(exact(repeated, [text_of(new) for new in sampled]))
    return {
        "sampled": rewards.view(-1, draws).mean(1).tolist(),
        "greedy": exact(prompts, [text_of(new) for new in greedy]),
        "kl": [round(value, 4) for value in ratios.view(-1, draws).mean(1).tolist()],
    }


def text_of(new: Sequence[int]) -> str:
    """A continuation's text. One that has no end is no answer that could be right, as it is too long."""
    return decode([id for id in new if id != END])


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
    contender: Contender, study: Study, policy: Policy, anchor: Policy, prompts: list[Prompt], seed: int
) -> Objective:
    """What a step does, with as many samples or answers as every other contender."""
    method = contender.method
    if method is None:
        answers = [answer_ids(prompt.reference["answer"]) for prompt in prompts]
        return Sft(policy, prompts, answers, batch=study.samples, seed=seed)
    return Alignment(
        policy, anchor, method, prompts, exact, decode=decode, stops=frozenset({END}),
        batch=study.samples // (method.own + method.anchored), max_new=ANSWER,
        anchor_rate=study.anchor_rate if contender.moves else 0.0, seed=seed,
    )  # fmt: skip


def train(
    contender: Contender,
    study: Study,
    policy: Policy,
    anchor: Policy,
    prompts: list[Prompt],
    cell: Cell,
    steps: int,
    on_step: OnStep,
) -> None:
    """Train the policy; the anchor is where it begins. Of WARP only merged models are told to `on_step`."""
    # A rate that does not fall: what is measured on the way is what a shorter run would give.
    settings = LoopSettings(steps=steps, learning_rate=cell.rate, warmup=1 / 8, last_rate=1.0, clip=1.0)
    if not contender.rounds:
        objective = objective_of(contender, study, policy, anchor, prompts, cell.seed)
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
            objective = objective_of(contender, study, policy, anchor, prompts, seed)
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
    policy, anchor, start = Policy(base), Policy(base, trained=_none), Policy(base, trained=_none)
    contender, steps = CONTENDERS[cell.contender], study.tuning_steps if cell.tuning else study.steps
    points: list[dict[str, Any]] = []
    # Measuring is not the method's time.
    began, measuring = time.process_time(), 0.0

    def on_step(done: int, total: int, metrics: Metrics) -> None:
        nonlocal measuring
        at = time.process_time()
        if done == total or (not cell.tuning and done % study.every == 0):
            figures = measure(policy, start, data["tuning" if cell.tuning else "unseen"], study.draws)
            points.append({"step": done, "seconds": at - began - measuring, **figures})
        measuring += time.process_time() - at

    train(contender, study, policy, anchor, data["prompts"], cell, steps, on_step)
    seen = [] if cell.tuning else measure(policy, start, data["prompts"][:1000], 1)["sampled"]
    figures = {**dataclasses.asdict(cell), "points": points, "seen": seen}
    write(path, lambda draft: draft.write_text(json.dumps(figures)))
    return figures


def _none(name: str) -> bool:
    return False


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A contender's figures over its seeds.

    Attributes:
        contender: Its name.
        rate: Its learning rate.
        edge: Whether no higher, or no lower, rate was tried.
        seconds: Of the processor, a run.
        seen: Exact match of samples on a thousand of the prompts that it learned from: the reward.
        scores: [S, P] by what was measured, at the end, and `timed` at the seconds of the quickest.
        curve: (step, seconds, sampled exact match), means over the seeds.
    """

    contender: str
    rate: float
    edge: bool
    seconds: float
    seen: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64]]
    curve: Sequence[tuple[int, float, float]]


def rows(study: Study, folder: Path, seeds: int, start: Sequence[float]) -> list[Row]:
    """Of all runs that are there.

    Args:
        study: Their numbers.
        folder: Where they are.
        seeds: How many at most.
        start: Exact match of the base model's samples, a number a problem.
    """
    runs = {
        name: [run(cell, study, folder) for cell in cells(name, study, folder, seeds) if cell.path(folder).exists()]
        for name in CONTENDERS
    }
    ends = {name: [figures["points"][-1] for figures in done] for name, done in runs.items() if done}
    budget = budget_of({name: [point["seconds"] for point in points] for name, points in ends.items()})
    result = []
    for name, points in ends.items():
        scores = {key: np.array([point[key] for point in points]) for key in ("sampled", "greedy", "kl")}
        scores["timed"] = np.array([sampled_at(budget, figures["points"], start) for figures in runs[name]])
        curve = [
            (
                moment[0]["step"],
                float(np.mean([point["seconds"] for point in moment])),
                float(np.mean([point["sampled"] for point in moment])),
            )
            for moment in zip(*(figures["points"] for figures in runs[name]), strict=True)
        ]
        rate = runs[name][0]["rate"]
        result.append(
            Row(
                contender=name,
                rate=rate,
                edge=rate in (min(study.rates), max(study.rates)),
                seconds=float(np.mean([point["seconds"] for point in points])),
                seen=np.array([figures["seen"] for figures in runs[name]]),
                scores=scores,
                curve=curve,
            )
        )
    return result


def sampled_at(seconds: float, points: Sequence[Mapping[str, Any]], start: Sequence[float]) -> NDArray[np.float64]:
    """Exact match of samples after so many seconds, [P]: on the line between two measurements, or at the end."""
    times = [0.0, *(point["seconds"] for point in points)]
    scores_NP = np.array([start, *(point["sampled"] for point in points)])
    place = float(np.interp(seconds, times, range(len(times))))
    before, share = int(place), place % 1
    after = min(before + 1, len(points))
    result: NDArray[np.float64] = (1 - share) * scores_NP[before] + share * scores_NP[after]
    return result


def budget_of(seconds: Mapping[str, Sequence[float]]) -> float:
    """Seconds that all may use: a run of the quickest that samples, which right answers need not."""
    means = [float(np.mean(values)) for name, values in seconds.items() if CONTENDERS[name].method is not None]
    return min(means, default=float("inf"))


def estimated(scores: NDArray[np.float64]) -> Estimate:
    """A mean over seeds and problems."""
    return estimate_runs(scores, resamples=2000)


def compared(rows: Sequence[Row]) -> dict[str, Estimate]:
    """How far the others are below the one that samples right answers most often, on the same problems and seeds."""
    count = min(len(row.scores["sampled"]) for row in rows)
    best = max(rows, key=lambda row: float(row.scores["sampled"].mean()))
    return {
        row.contender: estimated(row.scores["sampled"][:count] - best.scores["sampled"][:count])
        for row in rows
        if row is not best
    }


def report(study: Study, rows: Sequence[Row], start: Mapping[str, list[float]], out: Path) -> None:
    """Write the files."""
    before = {key: estimated(np.array([scores])) for key, scores in start.items()}
    figures = [
        {
            "contender": row.contender,
            "note": CONTENDERS[row.contender].note,
            "anchor_moves": CONTENDERS[row.contender].moves,
            "seeds": len(row.seen),
            "rate": row.rate,
            "rate_is_at_the_edge": row.edge,
            "seconds": row.seconds,
            "curve": row.curve,
            **{key: estimated(scores).to_json() for key, scores in {"seen": row.seen, **row.scores}.items()},
        }
        for row in rows
    ]
    differences = {name: estimate.to_json() for name, estimate in compared(rows).items()} if rows else {}
    result = {
        "study": dataclasses.asdict(study),
        "libraries": versions(["torch", "numpy"]),
        "start": {key: estimate.to_json() for key, estimate in before.items()},
        "budget_seconds": budget_of({row.contender: [row.seconds] for row in rows}) if rows else None,
        "rows": figures,
        "below_the_best": differences,
        "missing": [*(name for name in CONTENDERS if name not in {row.contender for row in rows}), *MISSING],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "ablation.md").write_text(page(result))
    if rows and importlib.util.find_spec("matplotlib"):
        draw(rows, before["sampled"].value, out / "ablation.png")


def page(result: Mapping[str, Any]) -> str:
    """The figures as a page."""
    study, rows = result["study"], result["rows"]
    lines = [
        "# Alignment methods on one small task",
        "",
        "Sums and differences of numbers from 0 to 99; a Gemma 3 of two layers, width 64, 16 characters; one thread;",
        "written by `python -m benchmarks.ablation`. The base model learned answers of which "
        f"{study['wrong']:.0%} were wrong.",
        f"Every method then took {study['steps']} steps of {study['samples']} samples (SFT: right answers), with exact "
        "match as the",
        f"reward. Each learning rate is the best of {', '.join(f'{rate:g}' for rate in study['rates'])}, by one run of "
        f"{study['tuning_steps']} steps, on",
        f"{study['splits']['tuning']:,} problems of their own. Measured on {study['splits']['unseen']:,} distinct "
        "problems that stood in no training;",
        "only `reward` is of prompts that were learned from. In brackets: 95% by the bootstrap over seeds and problems",
        "(of few seeds, so rather too narrow; of one, of problems alone). KL to the base model is in nats an answer.",
        "",
        "| method | seeds | rate | reward | exact, sampled | exact, greedy | KL | sampled, equal time | s a run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| base model | | | | {_share(result['start']['sampled'])} | {_share(result['start']['greedy'])} | 0 | | |",
    ]
    for row in rows:
        kl, edge = row["kl"], "*" if row["rate_is_at_the_edge"] else ""
        lines.append(
            f"| {row['contender']} | {row['seeds']} | {row['rate']:g}{edge} | {_share(row['seen'])} "
            f"| {_share(row['sampled'])} | {_share(row['greedy'])} | {kl['value']:.2f} ({kl['low']:.2f} to "
            f"{kl['high']:.2f}) | {_share(row['timed'])} | {row['seconds']:.0f} |"
        )
    if not rows:
        lines += ["", "No run is complete yet."]
    else:
        lines += [
            "",
            f"Equal time: after {result['budget_seconds']:.1f} s of the processor, a run of the quickest method that "
            "samples, on the line between",
            f"two measurements (one every {study['every']} steps); what ended sooner, at its end. Measuring takes "
            "no part in any seconds.",
        ]
    if any(row["rate_is_at_the_edge"] for row in rows):
        lines += ["", "\\* The lowest or the highest that was tried: one beyond might be better."]
    lines += ["", "## Which is better", "", *_verdict(rows, result["below_the_best"])]
    lines += ["", "## Methods", ""]
    for row in rows:
        anchor = f"; the anchor moves by {study['anchor_rate']:g} a step" if row["anchor_moves"] else ""
        lines.append(f"- {row['contender']}: {row['note']}{anchor}.")
    if result["missing"]:
        lines += ["", f"Not run: {', '.join(result['missing'])}."]
    return "\n".join(lines) + "\n"


def _share(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _verdict(rows: Sequence[Mapping[str, Any]], below: Mapping[str, Mapping[str, float]]) -> list[str]:
    """In plain words; nothing of few seeds."""
    if len(rows) < 2:
        return ["Fewer than two methods were run."]
    if min(row["seeds"] for row in rows) < ENOUGH_SEEDS:
        return [f"Some methods have fewer than {ENOUGH_SEEDS} seeds: no order can be told."]
    (best,) = {row["contender"] for row in rows} - below.keys()
    lines = [f"{best} samples right answers most often. Differences to it, on the same seeds and problems:", ""]
    for name, difference in sorted(below.items(), key=lambda item: -item[1]["value"]):
        tie = ": a tie" if difference["high"] >= 0 else ""
        lines.append(f"- {name}: {_share(difference)}{tie}.")
    return lines


def draw(rows: Sequence[Row], start: float, path: Path) -> None:
    """Exact match over samples, over seconds, and over KL."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.5), layout="constrained", sharey=True)
    for row in rows:
        steps, seconds, sampled = zip(*row.curve, strict=True)
        axes[0].plot((0, *steps), (start, *sampled), marker=".", label=f"{row.contender}, {len(row.seen)} seeds")
        axes[1].plot((0.0, *seconds), (start, *sampled), marker=".")
        axes[2].plot(row.scores["kl"].mean(), row.scores["sampled"].mean(), "o")
    for axis, title in zip(axes, ("steps", "seconds of the processor", "KL to the base model at the end"), strict=True):
        axis.set(xlabel=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="exact match of samples, unseen problems")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, and write `ablation.json`, `ablation.md` and, with matplotlib, `ablation.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=ENOUGH_SEEDS, help="runs of every method")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="methods to run, with commas between")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing, report what there is")
    parser.add_argument("--work", type=Path, default=Path("artifacts/ablation"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - CONTENDERS.keys():
        parser.error(f"no method named {', '.join(sorted(unknown))}: choose of {', '.join(CONTENDERS)}")
    study = Study()
    folder = options.work / study.digest
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if not options.report:
        trained_base(study, folder)
        run_all([cell for name in names for cell in tuning_cells(name, study)], study, folder, options.jobs)
        # Seed by seed, so that a run that is stopped has as many of every method.
        todo = [cells(name, study, folder, options.seeds) for name in names]
        run_all([cell for seed in zip(*todo, strict=True) for cell in seed], study, folder, options.jobs)
    base = trained_base(study, folder)
    policy = Policy(base, trained=_none)
    start = measure(policy, policy, split(study)["unseen"], study.draws)
    report(study, rows(study, folder, options.seeds, start["sampled"]), start, options.out)


if __name__ == "__main__":
    main()
