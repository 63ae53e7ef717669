"""The result of an evaluation, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from transom.validation.compare import Array, Differences
from transom.validation.evaluation.speed import Speed
from transom.validation.result import finite

Axis = Literal["bytes", "decode"]
"""What perplexity is weighed against."""

PLAIN = "plain module"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over the scored tokens, and its standard error as if they were independent.

    Tokens of one text are not quite that, so the error is rather too small.
    """

    mean: float
    error: float

    @staticmethod
    def of(values: Array) -> Estimate:
        """Mean and standard error of one number a token, [N], N at least 2."""
        return Estimate(mean=float(values.mean()), error=float(values.std(ddof=1) / math.sqrt(len(values))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a row is of.

    Attributes:
        name: Unique.
        target: A key of `passes.targets.TARGETS`, or "plain module": the oracle.
        scheme: Name of the scheme.
        dtype: What it computes in.
        folder: The artifact, if it was kept.
        weights: Where the numbers came from, and their revision: the model's, unless an artifact was trained on.
        bytes: What the artifact needs to run, tokenizer and manifest apart; of the oracle, the weights as the
            checkpoint yields them.
        bytes_per_weight: `bytes` by the number of the model's weights.
    """

    name: str
    target: str
    scheme: str
    dtype: str
    folder: str | None
    weights: Mapping[str, str]
    bytes: int
    bytes_per_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Facts):
    """One scheme on one target, measured.

    Attributes:
        loss: Negative log-likelihood of a token, in nats.
        loss_difference: Loss above the oracle's, token by token. Its error is that of the differences alone, without
            what the text adds to both sides alike: this is what tells schemes apart.
        kl: KL(oracle || this) of a token's distribution, in nats.
        top1_agreement: Share of tokens before which both hold the same one for the likeliest.
        prefill: Tokens a second, read at once; None of the oracle.
        decode: Tokens a second, one by one; None of the oracle.
        seconds: Wall time of compiling and measuring.
    """

    loss: Estimate
    loss_difference: Estimate
    kl: Estimate
    top1_agreement: float
    prefill: float | None
    decode: float | None
    seconds: float

    @staticmethod
    def of(
        facts: Facts, scores: Sequence[Differences], oracle: Sequence[Differences], speed: Speed | None, seconds: float
    ) -> Row:
        """What a target's logits come to.

        Args:
            facts: What it is.
            scores: Its differences, a sequence each. The last position of one predicts nothing that is known.
            oracle: Those of the oracle from itself.
            speed: Its own; None of the oracle.
            seconds: Wall time.
        """
        losses, plain = (-np.concatenate([part.log_likelihood for part in parts]) for parts in (scores, oracle))
        return Row(
            **vars(facts),
            loss=Estimate.of(losses),
            loss_difference=Estimate.of(losses - plain),
            kl=Estimate.of(np.concatenate([part.kl[:-1] for part in scores])),
            top1_agreement=float((np.concatenate([part.gap[:-1] for part in scores]) == 0).mean()),
            prefill=None if speed is None else speed.prefill,
            decode=None if speed is None else speed.decode,
            seconds=seconds,
        )

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return float(np.exp(self.loss.mean))

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity, the text's own spread included."""
        return self.perplexity * self.loss.error

    def to_json(self) -> dict[str, Any]:
        """Plain data; speeds are in tokens a second."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Facts)},
            "weights": dict(self.weights),
            "perplexity": self.perplexity,
            "perplexity_error": self.perplexity_error,
            "loss": self.loss.mean,
            "loss_error": self.loss.error,
            "loss_difference": self.loss_difference.mean,
            "loss_difference_error": self.loss_difference.error,
            "kl": self.kl.mean,
            "kl_error": self.kl.error,
            "top1_agreement": self.top1_agreement,
            "prefill_tokens_per_s": self.prefill,
            "decode_tokens_per_s": self.decode,
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model under several schemes.

    Attributes:
        model: Its name.
        parameters: Numbers in its weights.
        source: Where the weights came from, and their revision.
        oracle: What the rows are compared with, in words.
        text: File, sha256 of the token ids, and how it was cut.
        speed: How the speeds were measured.
        rows: The oracle first.
        not_run: What was left out by name, with the reason.
        versions: Of the libraries.
        date: In UTC.
    """

    model: str
    parameters: int
    source: Mapping[str, str]
    oracle: str
    text: Mapping[str, Any]
    speed: Mapping[str, Any]
    rows: tuple[Row, ...]
    not_run: Mapping[str, str]
    versions: Mapping[str, str]
    date: str

    @property
    def plain(self) -> Row:
        """The oracle's row."""
        return self.rows[0]

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows of targets."""
        return self.rows[1:]

    def front(self, axis: Axis) -> tuple[Row, ...]:
        """Rows that no other one beats in both: perplexity, and fewer bytes or more tokens a second when decoding.

        The oracle takes no part: it is not deployed.
        """
        costs = [
            (float(row.bytes) if axis == "bytes" else -(row.decode or math.nan), row.perplexity)
            for row in self.measured
        ]
        return tuple(self.measured[index] for index in front(costs))

    def fronts_of(self, row: Row) -> tuple[Axis, ...]:
        """The fronts that a row is on."""
        axes: tuple[Axis, ...] = ("bytes", "decode")
        return tuple(axis for axis in axes if row in self.front(axis))

    def to_json(self) -> dict[str, Any]:
        """Plain data, JSON's own: a number that is not finite is null."""
        data: dict[str, Any] = finite(
            {
                "model": self.model,
                "parameters": self.parameters,
                "source": dict(self.source),
                "oracle": self.oracle,
                "text": dict(self.text),
                "speed": dict(self.speed),
                "date": self.date,
                "versions": dict(self.versions),
                "not_run": dict(self.not_run),
                "rows": [{**row.to_json(), "on_front": list(self.fronts_of(row))} for row in self.rows],
            }
        )
        return data


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one dominates, by rising first number.

    A point dominates another if it is as low in both numbers and lower in one; so of equal points all stay.

    Args:
        points: Two costs each, the lower the better; a point with a number that is not finite is on no front.
    """
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    kept = [index for index in finite if not any(_dominates(points[other], points[index]) for other in finite)]
    return sorted(kept, key=lambda index: points[index])


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
