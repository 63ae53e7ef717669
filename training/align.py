"""Align a checkpoint with rewards, answers or people's preferences: the run from prompts to folder."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.errors import RewardError, TrainingError
from transom.training.averaging import ETA, MU
from transom.training.checkpoint import RECIPE, TRAINED, check_apart, write_trained
from transom.training.loop import Loop, LoopSettings, Objective, OnStep, RunSettings
from transom.training.objectives.alignment import Alignment, Method, Score
from transom.training.objectives.rankings import Rankings, ranked_ids
from transom.training.objectives.sft import Sft, answer_ids
from transom.training.parallel import processes
from transom.training.policy import Policy
from transom.training.prompts import Prompt, read_prompts
from transom.training.rewards.reward import Reward, Sample, reward, score_many
from transom.training.rollouts import ONNXRUNTIME, ROLLOUTS, TORCH
from transom.training.runs import Runs
from transom.training.state import TrainingState
from transom.training.warp import WarpSettings, warp
from transom.zoo.architectures import build_empty
from transom.zoo.model import Model

METHODS = ("best_of_n", "rloo", "bond", "jbond", "dpo", "rrhf")
"""Modules of `objectives`. Each ends with `METHOD`, a dataclass of the method's own numbers."""

SFT = "sft"

RANKED = ("dpo", "rrhf")
"""Those of `METHODS` that learn rankings of the data too, where there is no reward."""

_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "Mapping": (dict,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignSettings(RunSettings):
    """How to align: a recipe. Its examples are prompts; `RunSettings` has the rest.

    Attributes:
        objective: "sft", or one of `METHODS`.
        options: The method's own numbers, such as its `beta`.
        reward: Name of a reward; "" for sft, which has answers, and for rankings of the data.
        reward_options: What the reward takes.
        max_new: Most tokens of a continuation.
        temperature: Of sampling.
        learning_rate: At its peak.
        anchor_rate: Share of the policy that the anchor moves by after every step; 0 for an anchor that stays.
        chat: Whether prompts are what a user says, in the model's chat template.
        train_table: Whether the table of tokens is trained too.
        workers: Continuations that are scored at a time.
        rollouts: What samples: "onnxruntime" (on a CPU) or "torch".
        rounds: Of WARP: how often runs are merged, to begin the next ones there; 0 for a single run.
        runs: Of WARP: how many in a round. All settings are each run's: `rounds * runs * steps` steps are taken.
        eta: Of WARP: share of the way from a round's start to its merged runs.
        seed: The runs of WARP have seeds of their own, which follow from it.

    Raises:
        TrainingError: If an objective is unknown, or settings don't go together.
    """

    objective: str
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reward: str = ""
    reward_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_new: int = 64
    temperature: float = 1.0
    learning_rate: float = 3e-6
    anchor_rate: float = 0.0
    chat: bool = False
    train_table: bool = True
    workers: int = 1
    rollouts: str = ONNXRUNTIME
    rounds: int = 0
    runs: int = 2
    eta: float = ETA

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("max_new", "workers", "runs")
        if self.objective != SFT and self.objective not in METHODS:
            raise TrainingError(f"there is no objective {self.objective!r}: choose {', '.join((SFT, *METHODS))}")
        if self.objective == SFT and self.reward:
            raise TrainingError("sft learns answers, so it takes no reward: leave it out")
        if self.objective not in (SFT, *RANKED) and not self.reward:
            raise TrainingError(f"the objective {self.objective} learns from a reward: name one")
        if self.objective == SFT and (self.options or self.anchor_rate):
            raise TrainingError("sft has no numbers of its own, nor an anchor: leave them out")
        if self.rounds and not self.reward:
            raise TrainingError("rounds of runs (WARP) learn from a reward: name one, or leave the rounds out")
        if self.ranks and "samples" in self.options:
            raise TrainingError("without a reward nothing is sampled, the data have the responses: leave `samples` out")
        if self.ranks and self.anchor_rate and not self.method().compares:
            raise TrainingError(f"{self.objective} compares the data's responses with no anchor: leave its rate out")
        if self.rollouts not in ROLLOUTS:
            raise TrainingError(f"nothing samples by the name {self.rollouts!r}: choose {' or '.join(ROLLOUTS)}")
        if not 0 <= self.anchor_rate < 1:
            raise TrainingError(f"the anchor's rate is {self.anchor_rate}: give a share from 0 to 1")
        if self.rounds < 0 or not 0 <= self.eta <= 1:
            raise TrainingError(f"{self.rounds} rounds and eta {self.eta}: give 0 or more, and a share from 0 to 1")

    @classmethod
    def of(cls, **values: Any) -> AlignSettings:
        """Settings. Where none are given, WARP has the paper's objective and anchor, and PyTorch samples on a GPU."""
        if values.get("device", "cpu") != "cpu":
            values = {"rollouts": TORCH, **values}
        if values.get("rounds"):
            values = {"objective": "rloo", "anchor_rate": MU, **values}
        return cls(**values)

    @property
    def ranks(self) -> bool:
        """Whether rankings of the data are learned, and no reward."""
        return self.objective in RANKED and not self.reward

    @property
    def loop(self) -> LoopSettings:
        """How the optimiser steps."""
        return self.loop_at(self.learning_rate)

    def method(self) -> Method:
        """The method with its numbers.

        Raises:
            TrainingError: If it takes other numbers.
        """
        create = importlib.import_module(f"transom.training.objectives.{self.objective}").METHOD
        try:
            method: Method = create(**self.options)
        except TypeError:
            fields = ", ".join(field.name for field in dataclasses.fields(create))
            raise TrainingError(
                f"the objective {self.objective} takes {fields}, not {', '.join(self.options)}"
            ) from None
        return method


def read_recipe(path: Path, **changes: Any) -> AlignSettings:
    """Settings from a TOML file, less what is changed.

    Raises:
        TrainingError: If it cannot be read, or a value is of no setting or of another type.
    """
    try:
        values = {**tomllib.loads(path.read_text(encoding="utf-8")), **changes}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"cannot read the recipe {path} ({error}): write TOML") from error
    kinds = {field.name: str(field.type) for field in dataclasses.fields(AlignSettings)}
    if unknown := values.keys() - kinds.keys():
        raise TrainingError(f"{path} sets {', '.join(sorted(unknown))}, which is no setting: {', '.join(kinds)} are")
    for name, value in values.items():
        kind = kinds[name].partition("[")[0]
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise TrainingError(f"{path} sets {name} to {value!r}, which is no {kind.lower()}")
    if "objective" not in values and not values.get("rounds"):
        raise TrainingError(f"{path} names no objective: set one, or give it beside the recipe")
    return AlignSettings.of(**values)


def write_recipe(settings: AlignSettings, path: Path) -> None:
    """Write settings as `read_recipe` reads them."""
    values = dataclasses.asdict(settings)
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")


def align(
    model: Model,
    settings: AlignSettings,
    *,
    data: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    on_step: OnStep = lambda done, total, metrics: None,
) -> list[Mapping[str, float]]:
    """Train a model on prompts, and write it.

    Args:
        model: Where it begins, and the first anchor.
        settings: How.
        data: JSON lines, each with its `prompt`; for sft with its `answer`, for rankings with its `chosen` and
            `rejected` or `ranked`, else with what the reward reads.
        out: Folder of the checkpoint; it appears only when it is whole.
        dtype: Of the weights that are written.
        overwrite: Whether to replace a folder that an earlier run wrote.
        on_step: Told of every step.

    Returns:
        The metrics of every step; for WARP with the round and the run, counted from 1.

    Raises:
        TrainingError: If settings or data don't fit, the device is missing, a saved state is of another run, or
            training diverges, or another process of the run ends.
        RewardError: If the reward cannot be made, or too many continuations cannot be scored.
        TokenizerError: If the model has no tokenizer, or no chat template that is asked for.
        ContextLengthError: If a prompt leaves too little of the context.
        ArtifactError: If `out` exists or cannot be written.
    """
    model = model.text()
    check_apart(out, model)
    prompts = read_prompts(model, data, max_new=settings.max_new, chat=settings.chat)
    with processes(settings.device) as shards, shards.new_folder(out, overwrite=overwrite, kind=TRAINED) as folder:
        if shards.count > 1 and settings.objective != SFT:
            raise TrainingError(f"several processes align by sft alone, not by {settings.objective}: start one")
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        head = build_empty(model.config).head_weight

        def objective(start: Model, seed: int) -> tuple[Policy, Objective]:
            policy = Policy(
                start,
                device=settings.device,
                trained=lambda name: settings.train_table or name != head,
                recompute=settings.recompute,
                shards=shards,
                rollouts=settings.rollouts,
            )
            return policy, _objective(start, policy, prompts, dataclasses.replace(settings, seed=seed))

        report: dict[str, Any] = {"settings": dataclasses.asdict(settings), "source": model.source, "data": digest}
        state: TrainingState | Runs
        if settings.rounds:
            shape = WarpSettings(rounds=settings.rounds, runs=settings.runs, eta=settings.eta, seed=settings.seed)
            total = settings.rounds * settings.runs * settings.steps
            state = Runs(out, settings, model.revision, digest, total=total, on_step=on_step)
            trained, report["warp"] = warp(model, shape, state, settings.loop, lambda *start: objective(*start)[1])
            metrics = state.metrics
            write_trained(folder, trained, report, dtype=dtype)
        else:
            state = TrainingState(out, settings, model.revision, digest, shards)
            saved = state.load()
            policy, learned = objective(model, settings.seed)
            metrics = Loop(learned, settings.loop, state=state, saved=saved, on_step=on_step).run()
            policy.write(lambda trained: write_trained(folder, trained, report, dtype=dtype))
        if shards.is_first:
            write_recipe(settings, folder / RECIPE)
        state.finish(folder)
    state.remove()
    return metrics


def _objective(model: Model, policy: Policy, prompts: list[Prompt], settings: AlignSettings) -> Objective:
    tokenizer = model.tokenizer
    assert tokenizer is not None, "prompts were read with it"
    if settings.objective == SFT:
        answers = answer_ids(tokenizer, prompts, settings.max_new)
        return Sft(policy, prompts, answers, batch=settings.batch, parts=settings.parts, seed=settings.seed)
    method = settings.method()

    def anchor() -> Policy:
        return Policy(model, device=settings.device, trained=lambda name: False, rollouts=settings.rollouts)

    if settings.ranks:
        return Rankings(
            policy,
            anchor() if method.compares else None,
            method,
            prompts,
            ranked_ids(tokenizer, prompts, settings.max_new),
            batch=settings.batch,
            parts=settings.parts,
            anchor_rate=settings.anchor_rate,
            seed=settings.seed,
        )
    return Alignment(
        policy,
        anchor(),
        method,
        prompts,
        _scores(reward(settings.reward, **settings.reward_options), settings.workers),
        decode=tokenizer.decode,
        stops=frozenset(tokenizer.stop_ids),
        batch=settings.batch,
        parts=settings.parts,
        max_new=settings.max_new,
        temperature=settings.temperature,
        anchor_rate=settings.anchor_rate,
        seed=settings.seed,
    )


def _scores(reward: Reward, workers: int) -> Score:
    """A reward of whole batches. One without a value would have to be made up, so it ends the run."""

    def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        samples = [Sample(prompt.text, text, prompt.reference) for prompt, text in zip(prompts, texts, strict=True)]
        values = []
        for result in score_many(reward, samples, workers=workers, most_failures=0.0).scores:
            if result.value is None:
                raise RewardError(result.reason)
            values.append(result.value)
        return values

    return score
