"""What may be wrong with a site's weights, and with the precision of what they are multiplied with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from transom.errors import QuantizationError
from transom.formats.schemes import SCHEMES, QuantSpec
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.validation.bisection.context import Context, Rows, rounded
from transom.validation.bisection.replay import Hypothesis, Replay, from_node, identity

BLOCKS = (16, 32, 64, 128)
"""Columns that share a scale where kernels round activations."""


def of_weights(replay: Replay) -> Iterator[Hypothesis]:
    """The weights of another site of this operation, turned or left out."""
    context, site = replay.context, replay.site
    weights, heads = replay.weights(), site.calls(aten.linear.default)
    others = {name for other in context.sites(site.tap.op) for name in context.weights(other).values()}
    near = {name for other in context.sites_of_layer(site.tap.layer) for name in context.weights(other).values()}
    is_product = site.op in ("projection", "activation")
    for node, name in weights.items():
        shape = context.graph.weights[name].shape
        for other in sorted((others | near) - {*weights.values()}):
            if context.graph.weights[other].shape == shape:
                belongs = "the norm has the weight of" if site.op == "norm" else "the weights are those of"
                cause = f"{belongs} {other.removesuffix('.weight')}"
                yield Hypothesis(cause, {node: context.rows(other)})
            elif other in near and len(shape) == 2 and context.graph.weights[other].shape == shape[::-1]:
                cause = f"the weights are those of {other.removesuffix('.weight')}, transposed"
                yield Hypothesis(cause, {node: _turned(context, other)})
        if site.op != "norm" and len(shape) == 1 and _is_factor(node):
            yield Hypothesis(f"the factor {name} is left out", {node: from_node(node, torch.ones_like)})
        if is_product and len(shape) == 1:
            yield Hypothesis("the bias is left out", {node: from_node(node, torch.zeros_like)})
        if is_product and len(shape) == 2 and shape[0] == shape[1]:
            yield Hypothesis("the weights are transposed", {node: _turned(context, name)})
    if site.op == "logits" and heads:
        width = heads[0].args[0].meta["val"].shape[-1] ** 0.5
        changes = {heads[0]: from_node(heads[0], lambda value: value * width)}
        yield Hypothesis("the head has the embedding's factor", changes)


def _is_factor(vector: Node) -> bool:
    """Whether it is multiplied with, or numbers of it are chosen to be multiplied with."""
    return any(is_call(user, aten.mul.Tensor, aten.index.Tensor) for user in vector.users)


def _turned(context: Context, name: str) -> Rows:
    return Rows(weight=Weight.of(context.rows(name).read().T.contiguous()))


def of_order(replay: Replay) -> Iterator[Hypothesis]:
    """Rows of the weights of one product in another order, with its bias and without."""
    right, y = (value.flatten(1).double() for value in (replay.run(), replay.output))
    matrices = _matrices(replay)
    if len(matrices) != 1:
        return
    # A bias moves the whole of a column.
    right, y = right - right.mean(0), (y - y.mean(0)).nan_to_num(0.0)
    order = (right.square().sum(0) - 2 * (y.T @ right)).argmin(1)
    at = torch.arange(len(order))
    if torch.equal(order, at) or not torch.equal(order.sort().values, at):
        return
    ((node, name),) = matrices.items()
    first = int((order != at).nonzero()[0])
    cause = f"rows of the weights stand in another order: row {first} is row {int(order[first])} of the checkpoint"
    rows = replay.context.rows(name).read()
    is_moved = rows.shape[0] == len(order)
    yield from [Hypothesis(cause, {node: Rows(weight=Weight.of(rows[order]))})] if is_moved else []
    yield Hypothesis(f"{cause}, and of the bias", output=lambda value: value.flatten(1)[:, order].view_as(value))


def _matrices(replay: Replay) -> dict[Node, str]:
    """Names of the site's matrices."""
    weights = replay.context.graph.weights
    return {node: name for node, name in replay.weights().items() if len(weights[name].shape) == 2}


def of_fitted_weights(replay: Replay) -> Iterator[Hypothesis]:
    """A bias that is added, and the weights that would give the output of a projection."""
    right, y = replay.run(), replay.output
    error = (y - right).flatten(1)
    bias = error.median(0).values.view_as(right[0])
    yield Hypothesis("a bias is added", output=lambda value: value + bias)
    rows = (error.abs().amax(0) > replay.context.tolerance * y.abs().amax()).nonzero().flatten().tolist()
    count, product = error.shape[1], replay.site.calls(aten.linear.default, aten.matmul.default)[-1]
    words = f"{len(rows)} of {count} output rows differ (first {rows[0] if rows else 0})"
    x = replay.value(product.args[0])[0].flatten(1)
    if x.shape[0] >= 1.2 * x.shape[1]:
        change = torch.linalg.lstsq(x.double(), error.double()).solution.float()
        largest = f"the largest change of a weight is {change.abs().max():.3g}"
        cause = f"the weights are not the checkpoint's: {words}, {largest}"
        yield Hypothesis(cause, output=lambda value: value + (x @ change).view_as(value))
    elif 0 < len(rows) < count:
        mended = right.flatten(1).clone()
        mended[:, rows] = y.flatten(1)[:, rows]
        yield Hypothesis(f"the weights of {words}", output=mended.view_as)


def of_rounding(replay: Replay) -> Iterator[Hypothesis]:
    """Weights that are rounded otherwise than the scheme says, or not at all; activations in 8 bits.

    All matrices of a site are rounded alike: passes stack them.
    """
    context, weights = replay.context, replay.context.graph.weights
    names = _matrices(replay)
    if not names:
        return

    def guess(cause: str, change: Any) -> Hypothesis:
        rows = {node: Rows(weight=weights[name], change=change) for node, name in names.items()}
        return Hypothesis(cause, rows, op="quantisation")

    first = next(iter(names.values()))
    what = "the head is" if replay.site.op == "logits" else "the weights are"
    for words, spec in _other_specs(context, first):
        yield guess(f"{what} {words}", partial(rounded, spec=spec))
    if context.spec(first) is not None:
        yield guess(f"{what} not quantised", identity)
    yield guess(f"{what} rounded to bfloat16", lambda rows: rows.bfloat16().float())
    yield guess(f"{what} rounded to float16", lambda rows: rows.half().float())
    for source in dict.fromkeys(node.args[0] for node in replay.site.calls(aten.linear.default)):
        for block in BLOCKS:
            if source.meta["val"].shape[-1] % block == 0:
                cause = f"activations are rounded to 8 bits in blocks of {block}"
                change = from_node(source, partial(_rounded_activations, block=block))
                yield Hypothesis(cause, {source: change}, op="quantisation")


def _other_specs(context: Context, name: str) -> Iterator[tuple[str, QuantSpec]]:
    """Every way in which a weight may be quantised, except the one that the scheme gives it."""
    scheme_spec, columns = context.spec(name), context.graph.weights[name].shape[1]

    def key(spec: QuantSpec) -> tuple[Any, ...]:
        where = "tensor" if spec.block == "tensor" else spec.group(columns)
        return spec.format, where, spec.symmetric, spec.signed_scale, spec.scale_dtype

    # What differs only in the names that it is for, or in how it would cut wider matrices, is the same here.
    specs: dict[tuple[Any, ...], QuantSpec] = {}
    for spec in (spec for scheme in SCHEMES.values() for spec in scheme.specs):
        with contextlib.suppress(QuantizationError):
            specs.setdefault(key(spec), spec)
    if scheme_spec is not None:
        specs.pop(key(scheme_spec), None)
    for spec in sorted(specs.values(), key=lambda spec: (-spec.bits, str(spec.block), spec.symmetric, spec.format)):
        block = f"blocks of {spec.block}" if isinstance(spec.block, int) else f"one block a {spec.block}"
        kind = f"{spec.bits} bits" if spec.is_integer else spec.format
        yield f"rounded to {kind} in {block}", spec


def _rounded_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """Activations as integer kernels see them: int8 with a scale a block."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scales).round() * scales).reshape(x.shape)
