"""What may be wrong with a rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from transom.validation.bisection.evidence import RIGHT, Evidence, Hypothesis
from transom.zoo.rope import Rope

BASES = (1e4, 1e5, 5e5, 1e6)
FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def rotated(
    x_TNH: torch.Tensor, positions_T: torch.Tensor, rope: Rope, *, interleaved: bool = False, sign: int = 1
) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + H/2]), or (x[2 i], x[2 i + 1]), by the angles of their positions."""
    width = x_TNH.shape[-1]
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)) / rope.factor
    angles = positions_T[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin() * sign
    if interleaved:
        low, high = x_TNH[..., 0::2], x_TNH[..., 1::2]
        return torch.stack((low * cos - high * sin, high * cos + low * sin), -1).flatten(-2)
    low, high = x_TNH.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def of_rope(evidence: Evidence) -> Iterator[Hypothesis]:
    """Another base or scaling, other positions, other pairs."""
    context, layer, x, at = evidence.context, evidence.site.layer, evidence.inputs[0], evidence.positions
    assert layer is not None
    own, other = context.rope(layer), context.rope(layer, other=True)
    kind = context.config.layer_kinds[layer]
    other_kind = "global" if kind == "local" else "local"

    def guess(
        cause: str, rope: Rope = own, at: torch.Tensor = at, interleaved: bool = False, sign: int = 1
    ) -> Hypothesis:
        def predict() -> torch.Tensor:
            return rotated(x, at, rope, interleaved=interleaved, sign=sign)

        return Hypothesis(op="rope", cause=cause, predict=predict)

    yield guess(RIGHT)
    swapped = f"the {kind} layer is rotated with the RoPE base of {other_kind} layers"
    yield guess(f"{swapped}: {_words(other)} in place of {_words(own)}", other)
    mixed = Rope(theta=other.theta, factor=own.factor)
    yield guess(f"{swapped}, with its own scaling: {_words(mixed)} in place of {_words(own)}", mixed)
    for factor in sorted({other.factor, *FACTORS} - {own.factor}):
        words = "missing" if factor == 1 else f"{factor:g} in place of {own.factor:g}"
        yield guess(f"the RoPE scaling factor is {words}", Rope(theta=own.theta, factor=factor))
    for theta in sorted(set(BASES) - {own.theta, other.theta}):
        yield guess(f"the RoPE base is {theta:g} in place of {own.theta:g}", Rope(theta=theta, factor=own.factor))
    yield guess("RoPE's positions are one too large", at=at + 1)
    yield guess("RoPE's positions are one too small", at=at - 1)
    restarted = torch.cat([torch.arange(count) for _, count in evidence.calls])
    yield guess("RoPE's positions start again at 0 in every call", at=restarted)
    yield guess(f"RoPE's positions wrap at the window of {context.config.window}", at=at % context.config.window)
    yield guess("RoPE rotates interleaved pairs (2 i, 2 i + 1) in place of halves", interleaved=True)
    yield guess("RoPE rotates the other way", sign=-1)
    yield Hypothesis(op="rope", cause="there is no rotation", predict=lambda: x)
    fitted = _fit(x, evidence.output, at)
    if fitted is not None:
        yield guess(f"RoPE has {_words(fitted)} in place of {_words(own)}", fitted)


def _words(rope: Rope) -> str:
    return f"theta {rope.theta:g}" + (f" and factor {rope.factor:g}" if rope.factor != 1 else "")


def _fit(x_TNH: torch.Tensor, y_TNH: torch.Tensor, at: torch.Tensor) -> Rope | None:
    """Base and factor that turn x into y at position 1, where no angle exceeds one radian."""
    ones = (at == 1).nonzero().flatten()
    if not len(ones):
        return None
    first = int(ones[0])
    pairs = [torch.complex(*value[first].double().chunk(2, -1)) for value in (x_TNH, y_TNH)]
    angles = (pairs[1] * pairs[0].conj()).sum(0).angle()
    shares = torch.arange(len(angles), dtype=torch.float64) / len(angles)
    # Small angles are lost in the rounding of float32.
    telling = angles > 1e-3
    if int(telling.sum()) < 3:
        return None
    columns = torch.stack((-shares[telling], -torch.ones_like(shares[telling])), 1)
    theta, factor = torch.linalg.lstsq(columns, angles[telling].log()[:, None]).solution.flatten().tolist()
    return Rope(theta=float(f"{math.exp(theta):.4g}"), factor=float(f"{math.exp(factor):.4g}"))
