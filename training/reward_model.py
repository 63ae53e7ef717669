"""WARM (arXiv 2401.12187): reward models of one start, averaged; each has its own order of pairs, rate and dropout.

The head is fitted alone first, so that all members begin with the same one, which fits the features that they begin
with; then members and heads are trained, and all their weights averaged into one model that costs no more than one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.backends.folder import Kind, new_folder
from transom.errors import TrainingError
from transom.graphs.weight import Weight
from transom.training.averaging import Average
from transom.training.checkpoint import TRAINED, check_apart, write_trained
from transom.training.loop import LoopSettings, Metrics, OnStep, RunSettings
from transom.training.objectives.preference import HEAD, Preferences
from transom.training.policy import Policy
from transom.training.rewards.preference import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Encode,
    Pair,
    PreferenceModel,
    Probe,
    accuracy,
    encoder,
    fit_head,
    read_pairs,
)
from transom.training.runs import Runs
from transom.zoo.model import Model

PROBE, AVERAGE = "probe", "average"


def _files_of_reward_model(folder: Path) -> frozenset[str] | None:
    names = TRAINED.files(folder)
    if names is None or not (folder / CONFIG_FILE).is_file():
        return None
    return names | {CONFIG_FILE, WEIGHTS_FILE}


REWARD_MODEL = Kind(title=f"a reward model that transom trained ({CONFIG_FILE})", files=_files_of_reward_model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelSettings(RunSettings):
    """How to train; the examples are pairs, the steps each member's. `RunSettings` has the rest.

    Attributes:
        members: Models that are trained and averaged; 1 for a plain one.
        learning_rates: At their peaks, of the members in turn.
        dropouts: Shares of the hidden states that the head is not shown, of the members in turn.
        held_out: Pairs at the end of the file that are measured on, and not learned.

    Raises:
        TrainingError: If settings don't go together.
    """

    members: int = 3
    learning_rates: tuple[float, ...] = (1e-5, 4e-5, 1e-4)
    dropouts: tuple[float, ...] = (0.05, 0.1)
    last_rate: float = 0.1
    held_out: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("members")
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise TrainingError(f"the learning rates {self.learning_rates}: give positive numbers")
        if not self.dropouts or not all(0 <= rate < 1 for rate in self.dropouts):
            raise TrainingError(f"the dropouts {self.dropouts}: give shares from 0 on and below 1")

    def loop(self, member: int) -> LoopSettings:
        """How a member's optimiser steps."""
        return self.loop_at(self.learning_rates[member % len(self.learning_rates)])

    def dropout(self, member: int) -> float:
        """A member's dropout."""
        return self.dropouts[member % len(self.dropouts)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of held-out pairs that are ranked right; a tie counts one half.

    Attributes:
        name: What was measured: `PROBE`, the start with its head; "member 1" and so on; `AVERAGE`.
        value: The share.
        pairs: How many there are.
    """

    name: str
    value: float
    pairs: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval, if pairs are independent."""
        z, n = 1.959964, self.pairs
        middle = (self.value + z * z / (2 * n)) / (1 + z * z / n)
        width = z * math.sqrt(self.value * (1 - self.value) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - width), min(1.0, middle + width)

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        low, high = self.interval
        return {"name": self.name, "accuracy": self.value, "low": low, "high": high, "pairs": self.pairs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """Reward models of one start, the head alone that they begin with, and their average.

    Attributes:
        model: Where they begin.
        encode: How texts become tokens.
        settings: How they are trained.
        runs: Where they are kept.
    """

    model: Model
    encode: Encode
    settings: RewardModelSettings
    runs: Runs

    @property
    def names(self) -> list[str]:
        """Of the members."""
        return [f"member-{member + 1}" for member in range(self.settings.members)]

    @property
    def result(self) -> str:
        """Name of the average, or of the member that is alone."""
        return AVERAGE if self.settings.members > 1 else self.names[0]

    def train(self, pairs: Sequence[Pair]) -> None:
        """Fit the head, train every member, and average them, from where that was stopped."""
        settings, runs = self.settings, self.runs
        if not runs.has(PROBE):
            probe, _ = self._open({})
            loss = fit_head(probe, pairs, Probe(batch=settings.batch // settings.parts))
            runs.write(PROBE, {HEAD: Weight.of(probe.head.weight.detach().cpu())}, lambda: loss)
            del probe
        for member, name in enumerate(self.names):

            def create(member: int = member) -> Preferences:
                result, policy = self._open(runs.weights(PROBE), trained=True)
                return Preferences(
                    result,
                    policy.parameters,
                    pairs,
                    batch=settings.batch,
                    parts=settings.parts,
                    dropout=settings.dropout(member),
                    # Far apart: epochs of one order add to its seed.
                    seed=(settings.seed * settings.members + member) << 20,
                )

            runs.train(name, create, settings.loop(member), {"member": member + 1})
        if settings.members > 1:
            runs.merge(AVERAGE, Average.of("mean", settings.members), self.names)

    def open(self, name: str) -> PreferenceModel:
        """What is kept under a name, not to be trained."""
        return self._open(self.runs.weights(name))[0]

    def accuracies(self, pairs: Sequence[Pair]) -> list[Accuracy]:
        """Of the head alone, of every member and of their average, on pairs that they did not learn."""
        names = dict.fromkeys((PROBE, *self.names, self.result))
        return [
            Accuracy(name=name.replace("-", " "), value=accuracy(self.open(name), pairs), pairs=len(pairs))
            for name in names
        ]

    def _open(self, weights: Mapping[str, Weight], *, trained: bool = False) -> tuple[PreferenceModel, Policy]:
        settings = self.settings
        policy = Policy(
            with_weights(self.model, weights),
            device=settings.device,
            trained=lambda name: trained,
            recompute=settings.recompute,
        )
        result = PreferenceModel(policy.hidden, self.encode, self.model.config.hidden_size)
        with torch.no_grad():
            if HEAD in weights:
                result.head.weight.copy_(weights[HEAD].read())
        return result.to(policy.device), policy


def train_reward_model(
    model: Model,
    settings: RewardModelSettings,
    *,
    data: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    on_step: OnStep = lambda done, total, metrics: None,
) -> tuple[list[Accuracy], list[Metrics]]:
    """Train members on pairs, average them, and write one reward model.

    Args:
        model: Where all members begin.
        settings: How.
        data: JSON lines of `prompt`, `chosen` and `rejected`.
        out: Folder of the reward model; it appears only when it is whole.
        dtype: Of the weights that are written, but for the head's, which are float32.
        overwrite: Whether to replace a folder that an earlier run wrote.
        on_step: Told of every step.

    Returns:
        Accuracies on the held-out pairs, none if there are none; and the metrics of every step, with its member.

    Raises:
        RewardError: If the pairs cannot be read, or the model's hidden states are no numbers.
        TrainingError: If too few pairs are left to learn, the device is missing, saved runs are of other settings, or
            training diverges.
        TokenizerError: If the model has no tokenizer.
        ContextLengthError: If a pair is longer than the model's context.
        ArtifactError: If `out` exists or cannot be written.
    """
    model = model.text()
    check_apart(out, model)
    encode = encoder(model)
    pairs = read_pairs(data)
    if not 0 <= settings.held_out < len(pairs):
        raise TrainingError(f"{data} has {len(pairs):,} pairs, {settings.held_out:,} held out: leave some to learn")
    learned, held_out = (pairs[: len(pairs) - settings.held_out], pairs[len(pairs) - settings.held_out :])
    with new_folder(out, overwrite=overwrite, kind=REWARD_MODEL) as folder:
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        total = settings.members * settings.steps
        runs = Runs(out, settings, model.revision, digest, total=total, on_step=on_step)
        members = Members(model=model, encode=encode, settings=settings, runs=runs)
        members.train(learned)
        accuracies = members.accuracies(held_out) if held_out else []
        report = {
            "settings": dataclasses.asdict(settings),
            "source": model.source,
            "data": digest,
            "probe_loss": runs.note(PROBE),
            "accuracy": [each.to_json() for each in accuracies],
            "not_done": ["dropout inside the model: it is of the hidden states that the head reads"],
        }
        weights = runs.weights(members.result)
        write_trained(folder, with_weights(model, weights), report, dtype=dtype)
        head = PreferenceModel(lambda tokens_BT: tokens_BT, encode, model.config.hidden_size)
        head.head.load_state_dict({"weight": weights[HEAD].read()})
        head.save(folder)
        runs.finish(folder)
    runs.remove()
    return accuracies, runs.metrics


def with_weights(model: Model, weights: Mapping[str, Weight]) -> Model:
    """A model with the weights of a reward model, less its head."""
    body = {name: weight for name, weight in weights.items() if name != HEAD}
    return dataclasses.replace(model, weights={**model.weights, **body}, quant="none") if body else model
