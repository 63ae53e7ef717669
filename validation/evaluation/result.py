"""The result of an evaluation, as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from transom.validation.compare import Array, Differences
from transom.validation.result import finite

Axis = Literal["bytes", "decode"]
"""What perplexity is weighed against."""

PLAIN = "plain module"

FIRST_BUCKET = 512
"""Positions of the first bucket; each one after it ends at twice the position."""


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
class Bucket:
    """Loss of the tokens whose positions lie within bounds.

    Attributes:
        start: First position.
        stop: First position beyond.
        tokens: How many were scored there, in all sequences.
        loss: Negative log-likelihood of one of them, in nats; its error is not finite if there is but one.
    """

    start: int
    stop: int
    tokens: int
    loss: Estimate

    @property
    def title(self) -> str:
        """Its bounds, as people read them."""
        return f"{self.start:,}-{self.stop:,}"

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return float(np.exp(self.loss.mean))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        bounds = {"start": self.start, "stop": self.stop, "tokens": self.tokens}
        return {**bounds, "perplexity": self.perplexity, "loss": self.loss.mean, "loss_error": self.loss.error}


def buckets(losses: Sequence[Array]) -> tuple[Bucket, ...]:
    """Losses by position: up to 512, 1,024, 2,048 and so on.

    Args:
        losses: A sequence each: of the tokens from position 1 on.
    """
    parts, start, stop = list[Bucket](), 0, FIRST_BUCKET
    while any(len(part) >= max(start, 1) for part in losses):
        inside = np.concatenate([part[max(start, 1) - 1 : stop - 1] for part in losses])
        loss = Estimate.of(inside) if len(inside) > 1 else Estimate(mean=float(inside.mean()), error=math.nan)
        parts.append(Bucket(start=start, stop=stop, tokens=len(inside), loss=loss))
        start, stop = stop, 2 * stop
    return tuple(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme on one target, measured. The oracle's row has neither a folder nor speeds.

    Attributes:
        target: A key of `passes.targets.TARGETS`, or "plain module": the oracle.
        weights: Where the numbers came from, and their revision: the model's, unless an artifact was trained on.
        bytes: What the artifact needs to run, tokenizer and manifest apart; of the oracle, the weights as the
            checkpoint yields them.
        loss: Negative log-likelihood of a token, in nats.
        by_position: The same by where a token stands.
        loss_difference: Loss above the oracle's, token by token. Its error is that of the differences alone, without
            what the text adds to both sides alike: this is what tells schemes apart.
        kl: KL(oracle || this) of a token's distribution, in nats.
        top1_agreement: Share of tokens before which both hold the same one for the likeliest.
        prefill: Tokens a second, read at once; `decode` are those one by one.
        seconds: Wall time of compiling and measuring.
    """

    name: str
    target: str
    scheme: str
    dtype: str
    folder: str | None
    weights: Mapping[str, str]
    bytes: int
    bytes_per_weight: float
    loss: Estimate
    by_position: tuple[Bucket, ...]
    loss_difference: Estimate
    kl: Estimate
    top1_agreement: float
    prefill: float | None
    decode: float | None
    seconds: float

    @staticmethod
    def of(scores: Sequence[Differences], oracle: Sequence[Differences], **facts: Any) -> Row:
        """What a target's logits come to.

        Args:
            scores: Its differences, a sequence each. The last position of one predicts nothing that is known.
            oracle: Those of the oracle from itself.
            facts: What the logits do not tell.
        """
        losses, plain = (-np.concatenate([part.log_likelihood for part in parts]) for parts in (scores, oracle))
        return Row(
            loss=Estimate.of(losses),
            by_position=buckets([-part.log_likelihood for part in scores]),
            loss_difference=Estimate.of(losses - plain),
            kl=Estimate.of(np.concatenate([part.kl[:-1] for part in scores])),
            top1_agreement=float((np.concatenate([part.gap[:-1] for part in scores]) == 0).mean()),
            **facts,
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
        """Plain data: an estimate is two numbers."""
        data: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "loss":
                data |= {"perplexity": self.perplexity, "perplexity_error": self.perplexity_error}
            if name == "by_position":
                data[name] = [bucket.to_json() for bucket in self.by_position]
            elif isinstance(value, Estimate):
                data |= {name: value.mean, f"{name}_error": value.error}
            else:
                data[f"{name}_tokens_per_s" if name in ("prefill", "decode") else name] = value
        return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model under several schemes.

    Attributes:
        oracle: What the rows are compared with, in words.
        text: File, sha256 of the token ids, and how it was cut.
        speed: How the speeds were measured.
        not_run: What was left out by name, with the reason.
        rows: The oracle first.
    """

    model: str
    parameters: int
    source: Mapping[str, str]
    oracle: str
    text: Mapping[str, Any]
    speed: Mapping[str, Any]
    date: str
    versions: Mapping[str, str]
    not_run: Mapping[str, str]
    rows: tuple[Row, ...]

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
        rows = [{**row.to_json(), "on_front": self.fronts_of(row)} for row in self.rows]
        return finite({**vars(self), "rows": rows})  # type: ignore[no-any-return]


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
