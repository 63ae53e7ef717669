"""The ablation's reward models (WARM): pairs of the base model's samples, members that learn them, their average.

Right or wrong is all that a pair tells, by the exact reward, on the prompts that every method learns from. All runs
share them, as they would in practice; every run is charged with their time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation.task import (
    ANSWER,
    CHARACTERS,
    END,
    PROMPT,
    Study,
    answer_ids,
    frozen,
    split,
    text_of,
    trained_base,
    write,
)
from transom.training.objectives.alignment import Score
from transom.training.policy import Policy
from transom.training.prompts import Prompt
from transom.training.reward_model import Members, RewardModelSettings
from transom.training.rewards.preference import Pair, accuracy
from transom.training.runs import Runs
from transom.zoo.model import Model

WARM = RewardModelSettings(
    members=3, learning_rates=(1e-3, 2e-3, 3e-3), steps=300, batch=64, warmup=1 / 8, save_every=1000
)
DRAWS = 4
"""Samples of a prompt that pairs are made of."""

FIGURES = "warm.json"
"""Written when the reward models are trained and measured."""


def encode(prompt: str, completion: str) -> list[int]:
    """What a reward model reads: a problem and its answer, as a policy writes them."""
    return [*map(CHARACTERS.index, prompt.rjust(PROMPT)), *answer_ids(completion)]


def pairs_of(base: Model, prompts: Sequence[Prompt], seed: int) -> list[Pair]:
    """Of every prompt: the right answer with each of the wrong ones, if the base model samples both."""
    generator = torch.Generator().manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(DRAWS)]
    policy = Policy(base, trained=frozen)
    new = policy.sample([p.ids for p in repeated], max_new=ANSWER, stops=frozenset({END}), generator=generator)
    pairs = dict[Pair, None]()
    for start in range(0, len(repeated), DRAWS):
        prompt, right = repeated[start], repeated[start].reference["answer"]
        answers = [text_of(ids) for ids in new[start : start + DRAWS]]
        if right in answers:
            pairs |= dict.fromkeys(Pair(prompt.text, right, wrong) for wrong in answers if wrong != right)
    return list(pairs)


def members_of(study: Study, folder: Path) -> Members:
    """The reward models, trained or not."""
    base, total = trained_base(study, folder), WARM.members * WARM.steps
    runs = Runs(folder / "warm", WARM, base.revision, str(DRAWS), total=total)
    return Members(model=base, encode=encode, settings=WARM, runs=runs)


def train_members(study: Study, folder: Path) -> dict[str, Any]:
    """The figures of the reward models, from their file once there is one."""
    path = folder / FIGURES
    if path.exists():
        figures: dict[str, Any] = json.loads(path.read_text())
        return figures
    members, data = members_of(study, folder), split(study)
    began = time.process_time()
    pairs = pairs_of(members.model, data["prompts"], 0)
    members.train(pairs)
    seconds = time.process_time() - began
    figures = {
        "members": WARM.members,
        "seconds": seconds,
        "samples": DRAWS * len(data["prompts"]),
        "pairs": len(pairs),
        "on_learned_pairs": accuracy(members.open(members.result), pairs),
        "accuracy": [each.to_json() for each in members.accuracies(pairs_of(members.model, data["unseen"], 1))],
    }
    members.runs.forget(*members.names)
    write(path, lambda draft: draft.write_text(json.dumps(figures)))
    return figures


def learned_reward(study: Study, folder: Path) -> Score:
    """The average's reward."""
    members = members_of(study, folder)
    model = members.open(members.result)

    def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        with torch.no_grad():
            rewards: list[float] = model([(p.text, text) for p, text in zip(prompts, texts, strict=True)]).tolist()
        return rewards

    return score
