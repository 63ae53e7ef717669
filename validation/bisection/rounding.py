"""What may be wrong with the precision of weights, and of what they are multiplied with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from transom.errors import QuantizationError
from transom.formats.schemes import SCHEMES, QuantSpec
from transom.graphs.match import aten, is_call
from transom.validation.bisection.context import Context, Rows, rounded
from transom.validation.bisection.hypothesis import Hypothesis
from transom.validation.bisection.replay import Change, Replay

BLOCKS = (16, 32, 64, 128)
"""Columns that share a scale where kernels round activations."""


def of_rounding(replay: Replay) -> Iterator[Hypothesis]:
    """Weights that are rounded otherwise than the scheme says, or not at all; activations in 8 bits.

    All matrices of a site are rounded alike: passes stack them.
    """
    context = replay.context
    names = {node: name for node, name in replay.weights().items() if len(context.graph.weights[name].shape) == 2}
    if not names:
        return

    def guess(cause: str, change: Any) -> Hypothesis:
        rows = {node: Rows(weight=context.graph.weights[name], change=change) for node, name in names.items()}
        return Hypothesis(op="quantisation", cause=cause, predict=lambda: replay.run(rows))

    first = next(iter(names.values()))
    what = "the head is" if replay.site.op == "logits" else "the weights are"
    for words, spec in other_specs(context, first):
        yield guess(f"{what} {words}", lambda rows, spec=spec: rounded(rows, spec))
    if context.spec(first) is not None:
        yield guess(f"{what} not quantised", lambda rows: rows)
    for dtype in (torch.bfloat16, torch.float16):
        cause = f"{what} rounded to {str(dtype).removeprefix('torch.')}"
        yield guess(cause, lambda rows, dtype=dtype: rows.to(dtype).float())
    linears = [node for node in replay.site.nodes if is_call(node, aten.linear.default)]
    for source in dict.fromkeys(node.args[0] for node in linears):
        for block in BLOCKS:
            if source.meta["val"].shape[-1] % block == 0:
                change: Change = lambda value_of, source=source, block=block: _round(value_of(source), block)  # type: ignore[misc]  # noqa: E731
                cause = f"activations are rounded to 8 bits in blocks of {block}"
                predict = lambda source=source, change=change: replay.run({source: change})  # noqa: E731
                yield Hypothesis(op="quantisation", cause=cause, predict=predict)


def other_specs(context: Context, name: str) -> Iterator[tuple[str, QuantSpec]]:
    """Every way in which a weight may be quantised, except the one that the scheme gives it."""
    scheme_spec, columns = context.spec(name), context.graph.weights[name].shape[1]
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


def _round(x: torch.Tensor, block: int) -> torch.Tensor:
    """Activations as integer kernels see them: int8 with a scale a block."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scales).round() * scales).reshape(x.shape)
