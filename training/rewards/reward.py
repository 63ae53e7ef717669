"""What a reward is, how one is named, and how many completions are scored.

A reward that cannot be computed has no value, and says why. It is never counted as zero: a policy that is trained
against broken data would learn to avoid the prompts that the data breaks on.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from transom.errors import RewardError
from transom.wording import listed

REWARDS = ("mathematics", "code", "instructions", "preference")
"""Modules of this package. Each ends with `REWARD`, what makes its reward from options."""


class Score(NamedTuple):
    """What a completion earns.

    Attributes:
        value: None if it could not be computed, for which the completion is not to blame.
        reason: Why the value is what it is.
    """

    value: float | None
    reason: str


class Reward(Protocol):
    def score(self, prompt: str, completion: str, reference: Mapping[str, Any]) -> Score:
        """Score one completion.

        Args:
            prompt: What was asked.
            completion: What the policy wrote; nobody trusts it.
            reference: What the data says of a right answer; each reward says which keys it reads.

        Raises:
            RewardError: If no completion can be scored here, as a tool is missing.
        """


class Sample(NamedTuple):
    prompt: str
    completion: str
    reference: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Of many completions.

    Attributes:
        scores: In the order of the samples.
        failures: How many have no value, by reason.
    """

    scores: tuple[Score, ...]
    failures: Mapping[str, int]

    @property
    def mean(self) -> float | None:
        """Of those that have a value; None if none has."""
        values = [score.value for score in self.scores if score.value is not None]
        return sum(values) / len(values) if values else None


def reward(name: str, **options: Any) -> Reward:
    """The reward of a name of `REWARDS`.

    Args:
        name: Its module.
        options: What its `REWARD` takes.

    Raises:
        RewardError: If there is none of that name, or it takes other options.
    """
    if name not in REWARDS:
        raise RewardError(f"there is no reward {name!r}: choose one of {', '.join(REWARDS)}")
    create = importlib.import_module(f"transom.training.rewards.{name}").REWARD
    try:
        result: Reward = create(**options)
    except TypeError as reason:
        raise RewardError(f"the reward {name!r} cannot be made of these options: {reason}") from reason
    return result


def score_many(reward: Reward, samples: Sequence[Sample], *, workers: int = 1, most_failures: float = 0.1) -> Scores:
    """Score completions, and count those that could not be.

    Args:
        reward: The reward.
        samples: What to score.
        workers: How many to score at a time, in threads; for rewards that wait for other processes.
        most_failures: Share of the samples that may stay without a value.

    Raises:
        RewardError: If more have no value; the message counts the reasons.
    """
    with ThreadPoolExecutor(workers) as pool:
        scores = tuple(pool.map(lambda sample: reward.score(*sample), samples))
    failures = collections.Counter(score.reason for score in scores if score.value is None)
    if failures.total() > most_failures * len(scores):
        reasons = listed([f"{reason} ({count})" for reason, count in failures.most_common()])
        raise RewardError(
            f"{failures.total()} of {len(scores)} completions could not be scored, more than {most_failures:.0%}: "
            f"mend the data or the machine: {reasons}"
        )
    return Scores(scores=scores, failures=dict(failures))
