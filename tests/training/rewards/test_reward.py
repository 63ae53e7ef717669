"""Rewards by name, and many scores at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from transom.errors import RewardError
from transom.training.rewards.code import Code
from transom.training.rewards.instructions import Instructions
from transom.training.rewards.mathematics import Mathematics
from transom.training.rewards.reward import REWARDS, Sample, Score, reward, score_many


class Length:
    """The length of a completion; none of one that the reference has no length for."""

    def score(self, prompt: str, completion: str, reference: Mapping[str, Any]) -> Score:
        if "length" not in reference:
            return Score(None, "no length")
        return Score(float(len(completion)), "its length")


def samples(with_length: int, without: int) -> list[Sample]:
    good = [Sample("p", "x" * count, {"length": count}) for count in range(with_length)]
    return good + [Sample("p", "xx", {})] * without


def test_rewards_are_known_by_name() -> None:
    assert isinstance(reward("mathematics"), Mathematics)
    assert isinstance(reward("instructions"), Instructions)
    assert isinstance(reward("code"), Code)
    with pytest.raises(RewardError, match=f"'poems': choose one of {', '.join(REWARDS)}"):
        reward("poems")
    with pytest.raises(RewardError, match="'preference' cannot be made of these options"):
        reward("preference", size=3)


@pytest.mark.parametrize("workers", [1, 3])
def test_failures_are_counted_and_are_no_zeros(workers: int) -> None:
    scores = score_many(Length(), samples(10, 1), workers=workers, most_failures=0.1)
    assert [score.value for score in scores.scores] == [*map(float, range(10)), None]
    assert scores.failures == {"no length": 1}
    assert scores.mean == 4.5


def test_too_many_failures_are_an_error() -> None:
    with pytest.raises(RewardError, match=r"2 of 12 completions could not be scored, more than 10%: .*no length \(2\)"):
        score_many(Length(), samples(10, 2))


def test_no_samples() -> None:
    scores = score_many(Length(), [])
    assert scores.mean is None and not scores.failures


def test_an_error_of_the_machine_ends_all() -> None:
    class Missing(Length):
        def score(self, prompt: str, completion: str, reference: Mapping[str, Any]) -> Score:
            raise RewardError("bwrap is missing")

    with pytest.raises(RewardError, match="bwrap is missing"):
        score_many(Missing(), samples(3, 0))
