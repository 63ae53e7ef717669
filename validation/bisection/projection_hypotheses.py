"""What may be wrong with a projection, and with the weights of anything that has some: rounding above all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear

from transom.errors import QuantizationError
from transom.formats.schemes import SCHEMES, QuantSpec
from transom.validation.bisection.context import Context, rounded
from transom.validation.bisection.evidence import RIGHT, Evidence, Hypothesis, best_factor


def other_specs(context: Context, name: str) -> Iterator[tuple[str, QuantSpec]]:
    """Every way in which a weight may be quantised, except the one that the scheme gives it."""
    scheme_spec, columns = context.spec(name), context.weights[name].shape[1]
    # What differs only in the names that it is for, or in how it would cut wider matrices, is the same here.
    specs: dict[tuple[Any, ...], QuantSpec] = {}
    for spec in (spec for scheme in SCHEMES.values() for spec in scheme.specs):
        with contextlib.suppress(QuantizationError):
            specs.setdefault(_key(spec, columns), spec)
    if scheme_spec is not None:
        specs.pop(_key(scheme_spec, columns), None)
    for spec in sorted(specs.values(), key=lambda spec: (-spec.bits, str(spec.block), spec.symmetric, spec.number)):
        block = f"blocks of {spec.block}" if isinstance(spec.block, int) else f"one block a {spec.block}"
        kind = f"{spec.bits} bits" if spec.is_integer else spec.number
        yield f"rounded to {kind} in {block}", spec


def _key(spec: QuantSpec, columns: int) -> tuple[Any, ...]:
    where = "tensor" if spec.block == "tensor" else spec.group(columns)
    return spec.number, where, spec.symmetric, spec.signed_scale, spec.scale_dtype


def round_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """Activations as integer kernels see them: int8 with a scale a block."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scales).round() * scales).reshape(x.shape)


def of_projection(evidence: Evidence) -> Iterator[Hypothesis]:
    context, name = evidence.context, f"{evidence.site.path}.weight"
    x, weight, y = evidence.inputs[0], context.weight(name), evidence.output
    yield Hypothesis(op="projection", cause=RIGHT, predict=lambda: linear(x, weight))
    raw = context.weights[name].read().float()
    yield from quantised(context, name, lambda numbers: linear(x, numbers), raw)
    for block in (16, 32, 64, 128):
        if x.shape[-1] % block == 0:
            yield Hypothesis(
                op="quantisation",
                cause=f"activations are rounded to 8 bits in blocks of {block}",
                predict=lambda block=block: linear(round_activations(x, block), weight),  # type: ignore[misc]
            )
    for other in sorted(context.weights):
        if other != name and other.endswith("_proj.weight") and context.weights[other].shape == tuple(weight.shape):
            yield Hypothesis(
                op="projection",
                cause=f"the weights are those of {other.removesuffix('.weight')}",
                predict=lambda other=other: linear(x, context.weight(other)),  # type: ignore[misc]
            )
    if weight.shape[0] == weight.shape[1]:
        yield Hypothesis(op="projection", cause="the weights are transposed", predict=lambda: x @ weight)
    bias = (y - linear(x, weight)).median(0).values
    yield Hypothesis(op="projection", cause="a bias is added", predict=lambda: linear(x, weight) + bias)
    rows = ((y - linear(x, weight)).abs().amax(0) > context.tolerance * y.abs().amax()).nonzero().flatten().tolist()
    factor = best_factor(linear(x, weight), y)
    cause = f"the output is multiplied by {factor:.6g}"
    yield Hypothesis(op="projection", cause=cause, predict=lambda: linear(x, weight) * factor)
    fitted = _fit(x, y, weight)
    if fitted is not None:
        change = float((fitted - weight).abs().max())
        cause = (
            f"the weights are not the checkpoint's: {len(rows)} of {len(weight)} output rows differ "
            f"(first {rows[0] if rows else 0}), the largest change of a weight is {change:.3g}"
        )
        yield Hypothesis(op="projection", cause=cause, predict=lambda: linear(x, fitted))
    elif 0 < len(rows) < len(weight):
        mended = linear(x, weight)
        mended[:, rows] = y[:, rows]
        cause = f"the weights of {len(rows)} of {len(weight)} output rows differ (first {rows[0]})"
        yield Hypothesis(op="projection", cause=cause, predict=lambda: mended)


def quantised(
    context: Context, name: str, apply: Callable[[torch.Tensor], torch.Tensor], raw: torch.Tensor
) -> Iterator[Hypothesis]:
    """A weight that is rounded otherwise than it should be, or not at all."""
    for words, spec in other_specs(context, name):
        yield Hypothesis(
            op="quantisation",
            cause=f"the weights are {words}",
            predict=lambda spec=spec: apply(rounded(raw, spec)),  # type: ignore[misc]
        )
    if context.spec(name) is not None:
        yield Hypothesis(op="quantisation", cause="the weights are not quantised", predict=lambda: apply(raw))
    for dtype in (torch.bfloat16, torch.float16):
        yield Hypothesis(
            op="quantisation",
            cause=f"the weights are rounded to {str(dtype).removeprefix('torch.')}",
            predict=lambda dtype=dtype: apply(raw.to(dtype).float()),  # type: ignore[misc]
        )


def _fit(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The weights that would give the output; None if there are too few positions to tell."""
    if x.shape[0] < 1.2 * x.shape[1]:
        return None
    change: torch.Tensor = torch.linalg.lstsq(x.double(), (y - linear(x, weight)).double()).solution
    return weight + change.T.float()
