"""Rotary position embeddings, by how their frequencies are scaled."""

from __future__ import annotations

import dataclasses
import math

import torch

from transom.errors import ConfigError
from transom.wording import shortened


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding with linear scaling of positions (arXiv 2306.15595), or without scaling.

    Attributes:
        theta: Base of the frequencies.
        factor: Frequencies are divided by it.
    """

    theta: float
    factor: float = 1.0

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with, so that scores are with its square."""
        return 1.0

    def frequencies(
        self, head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Radians that each pair turns by a position, [head_dim / 2]."""
        exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
        return 1.0 / (self.theta**exponents) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalRope(Rope):
    """The first pairs turn as in the whole head, the others not at all.

    Source: transformers 5.23, "proportional". Pairs are those of the whole head: i and i + H/2.

    Attributes:
        fraction: Share of the pairs that turn, the count of which is rounded down.
    """

    fraction: float = 1.0

    def frequencies(
        self, head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Radians that each pair turns by a position, [head_dim / 2]."""
        plain, turning = super().frequencies(head_dim, device=device, dtype=dtype), int(self.fraction * head_dim // 2)
        return torch.cat((plain[:turning], torch.zeros_like(plain[turning:])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """Llama 3.1's scaling: slow pairs are divided by `factor`, fast ones are left, those between are blended.

    Source: the Llama 3.1 reference implementation, `apply_scaling`.

    Attributes:
        low_freq_factor: Pairs that turn fewer times than this within the original context are slow.
        high_freq_factor: Pairs that turn more often than this within it are fast.
        original_context: Tokens that the model was trained on before it was extended.
    """

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def frequencies(
        self, head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Radians that each pair turns by a position, [head_dim / 2]."""
        exponents = torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim
        plain = 1.0 / (self.theta**exponents)
        turns = self.original_context / (2 * math.pi / plain)
        # 0 where a pair is slow, 1 where it is fast.
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - share) * plain / self.factor + share * plain
        scaled = torch.where(turns < self.low_freq_factor, plain / self.factor, blended)
        return torch.where(turns > self.high_freq_factor, plain, scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN: slow pairs are divided by `factor`, fast ones are left, and a ramp over the pairs lies between.

    The ramp is straight in the pair's index, where Llama 3.1's is in its turns, and scores grow with the factor.

    Source: arXiv 2309.00071 (sections 3.2 and 3.4), with the bounds and defaults that transformers 5.23 computes.

    Attributes:
        original_context: Tokens that the model was trained on before it was extended.
        beta_fast: Pairs that turn more often than this within the original context are fast.
        beta_slow: Pairs that turn fewer times than this within it are slow.
        truncate: Whether the ramp begins and ends at whole pairs.
        attention_factor: What cosines and sines are multiplied with; None for `0.1 * ln(factor) + 1`.
    """

    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with, so that scores are with its square."""
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor

    def frequencies(
        self, head_dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Radians that each pair turns by a position, [head_dim / 2]."""

        def pair(turns: float) -> float:
            """Index of the pair that turns so often within the original context; a fraction."""
            return head_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001
        # 0 where a pair is fast, 1 where it is slow.
        share = ((torch.arange(head_dim // 2, device=device, dtype=dtype) - first) / (last - first)).clamp(0, 1)
        periods = self.theta ** (torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
        left = 1 - share
        return 1.0 / (self.factor * periods) * (1 - left) + 1.0 / periods * left


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """By what YaRN multiplies cosines and sines: `0.1 * weight * ln(factor) + 1`, and 1 where nothing is stretched."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary embeddings are stretched past the context that a model was made for.

    Attributes:
        kind: "linear" (arXiv 2306.15595), "llama3" (Llama 3.1) or "yarn" (arXiv 2309.00071).
        factor: By how much the context grows; more than 1.
    """

    kind: str
    factor: float

    @staticmethod
    def read(words: str) -> RopeScaling:
        """A scaling as users type it, such as "yarn:4".

        Raises:
            ConfigError: If the kind is unknown, or the factor is no number above 1.
        """
        kind, _, number = words.partition(":")
        if kind not in ("linear", "llama3", "yarn"):
            raise ConfigError(
                f"no rope scaling is named {shortened(kind)!r}: choose linear, llama3 or yarn, as in yarn:4"
            )
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not 1 < factor < math.inf:
            raise ConfigError(f"a rope scaling by {shortened(number)!r} is none: give a number above 1, as in {kind}:4")
        return RopeScaling(kind=kind, factor=factor)

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"

    def stretch(self, rope: Rope, context: int) -> Rope:
        """A plain rotary embedding, stretched.

        Args:
            rope: What is stretched.
            context: Tokens that the model was made for.

        Raises:
            ConfigError: If it is stretched already, or no plain one.
        """
        if rope != Rope(theta=rope.theta):
            # YaRN tells pairs apart by the turns of an unscaled rotation, and no paper says what it means on another.
            name = type(rope).__name__.removesuffix("Rope").lower() or "linear"
            raise ConfigError(
                f"its positions are scaled already ({name}, factor {rope.factor:g}), so its context is longer than the "
                "plain one, and nothing says how to scale them again: leave the scaling out"
            )
        if self.kind == "linear":
            return Rope(theta=rope.theta, factor=self.factor)
        kind = YarnRope if self.kind == "yarn" else Llama3Rope
        return kind(theta=rope.theta, factor=self.factor, original_context=context)


def rotation(positions_T: torch.Tensor, rope: Rope, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's angles, times the rope's magnitude, float32 [T, head_dim / 2] each."""
    angles = positions_T[:, None].float() * rope.frequencies(head_dim, device=positions_T.device)
    if rope.magnitude == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * rope.magnitude, angles.sin() * rope.magnitude


def rotate(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + H/2]) of every head, computed in float32."""
    low, high = x_BNTH.chunk(2, dim=-1)
    return torch.cat((low * cos_TH - high * sin_TH, high * cos_TH + low * sin_TH), dim=-1).type_as(x_BNTH)


def rotate_interleaved(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[2 i], x[2 i + 1]) of every head, computed in float32."""
    first, second = x_BNTH.view(*x_BNTH.shape[:-1], -1, 2).unbind(-1)
    pairs = (first * cos_TH - second * sin_TH, second * cos_TH + first * sin_TH)
    return torch.stack(pairs, dim=-1).flatten(-2).type_as(x_BNTH)
