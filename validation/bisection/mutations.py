"""What may be wrong at a site, as mutations of its part of the graph.

A cause is believed only if it reproduces the numbers that were seen. The first hypothesis of a site is that it does
what the graph says. All others change something that stands in the graph: a number, a weight, a call, an input, or
the output.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import gelu, rms_norm, silu

from transom.graphs.match import aten, is_call
from transom.graphs.node import Node, is_node
from transom.validation.bisection.attention import of_attention
from transom.validation.bisection.replay import RIGHT, Hypothesis, Replay, from_node
from transom.validation.bisection.rope import of_rope
from transom.validation.bisection.scalars import of_caps, of_scalars, scalars_of
from transom.validation.bisection.weights import of_fitted_weights, of_order, of_rounding, of_weights

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the exact gelu": gelu,
    "gelu in its tanh form": partial(gelu, approximate="tanh"),
    "silu": silu,
    "relu": torch.relu,
    "a sigmoid": torch.sigmoid,
}


def hypotheses(replay: Replay) -> Iterator[Hypothesis]:
    """Everything that may be the case at a site; first that it is right."""
    op = replay.site.tap.op
    if op == "attention":
        yield from of_attention(replay)
    else:
        yield Hypothesis(RIGHT)
    for maker in (_MAKERS.get(op), _of_pieces, of_scalars, of_caps, of_rounding, of_weights, _of_output):
        if maker is not None:
            yield from maker(replay)
    if op in ("projection", "activation"):
        yield from of_order(replay)
    if op == "projection":
        yield from of_fitted_weights(replay)


def _of_norm(replay: Replay) -> Iterator[Hypothesis]:
    site = replay.site
    for node in site.nodes:
        if is_call(node, aten.mul.Tensor) and node in site.moving:
            x = [side for side in node.args[:2] if side in site.moving]
            if len(x) == 1 and is_node(node.args[0]) and is_node(node.args[1]):
                yield Hypothesis("the norm has no weight", {node: from_node(x[0])})
        if is_call(node, aten.rsqrt.default) and node in site.moving:
            cause = "there is no norm: its input is only multiplied by the weight"
            yield Hypothesis(cause, {node: from_node(node, torch.ones_like)})
    ((source, value),) = replay.inputs.items()
    value = value.reshape(replay.output.shape)
    yield Hypothesis("there is no norm: its input comes out", output=lambda _: value)
    if layer_norms := site.calls(aten.layer_norm.default):
        _, shape, weight, bias, epsilon = layer_norms[0].args[:5]
        yield Hypothesis("the norm has no weight", {weight: from_node(weight, torch.ones_like)})
        if bias is not None:
            yield Hypothesis("the norm has no bias", {bias: from_node(bias, torch.zeros_like)})
        yield Hypothesis("the norm multiplies by 1 + w in place of w", {weight: from_node(weight, lambda w: 1 + w)})
        scaled = partial(rms_norm, value[None], shape, eps=epsilon)
        cause = "the norm does not subtract the mean, as RMSNorm does"
        added = (lambda value_of: 0.0) if bias is None else (lambda value_of: value_of(bias))
        yield Hypothesis(cause, {layer_norms[0]: lambda known: scaled(weight=known(weight)) + added(known)})
        return
    centred = replay.in_graph(source, value - value.mean(-1, keepdim=True))
    yield Hypothesis("the norm subtracts the mean, as LayerNorm does", {source: lambda _: centred})


def _of_activation(replay: Replay) -> Iterator[Hypothesis]:
    site, context = replay.site, replay.context
    calls = site.calls(aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default)
    for node in calls[:1]:
        x = node.args[0]
        right = called(node)
        for words, function in ACTIVATIONS.items():
            # What is right by another name would fit as well as what is right.
            if words != right:
                yield Hypothesis(f"the activation is {words} in place of {right}", {node: from_node(x, function)})
        yield Hypothesis("there is no activation", {node: from_node(x)})
    weights = {node: name for node, name in replay.weights().items() if node.meta["val"].dim() == 2}
    if len(weights) == 2 and len({node.meta["val"].shape for node in weights}) == 1:
        swapped = map(context.rows, reversed(weights.values()))
        yield Hypothesis("gate and up are swapped", dict(zip(weights, swapped, strict=True)))
    if is_call(site.node, aten.mul.Tensor):
        left, right = site.node.args[:2]
        cause = "gate and up are added in place of multiplied"
        yield Hypothesis(cause, {site.node: lambda value_of: value_of(left) + value_of(right)})


def called(activation: Node) -> str:
    """An activation's name, a key of `ACTIVATIONS`."""
    if is_call(activation, aten.gelu.default):
        return "gelu in its tanh form" if activation.kwargs.get("approximate") == "tanh" else "the exact gelu"
    return "a sigmoid" if is_call(activation, aten.sigmoid.default) else str(activation.target).split(".")[1]


def _of_residual(replay: Replay) -> Iterator[Hypothesis]:
    ops = {node: tap.op for tap, node in replay.context.taps.values()}
    # The stream is what was a sum, or the embedding, before.
    ordered = sorted(replay.inputs, key=lambda node: ops[node] not in ("residual", "embedding"))
    if len(ordered) != 2:
        return
    stream, branch = sorted(replay.site.node.args[:2], key=lambda side: side is ordered[1])
    for cause, combined in (
        ("the branch is not added: the stream comes out as it was", lambda stream, branch: stream),
        ("the stream is lost: only the branch comes out", lambda stream, branch: branch),
        ("the branch is added twice", lambda stream, branch: stream + 2 * branch),
        ("the stream is added twice", lambda stream, branch: 2 * stream + branch),
        ("the branch is subtracted", torch.sub),
    ):

        def change(value_of: Callable[[Node], Any], combined: Callable[..., Any] = combined) -> Any:
            return combined(value_of(stream), value_of(branch))

        yield Hypothesis(cause, {replay.site.node: change})


def _of_pieces(replay: Replay) -> Iterator[Hypothesis]:
    """Another piece of what is split."""
    for node in replay.site.calls(operator.getitem):
        whole, index = node.args
        if not is_call(whole, aten.split.Tensor, aten.split_with_sizes.default):
            continue
        for other, piece in enumerate(whole.meta["val"]):
            if other != index and piece.shape == node.meta["val"].shape:
                cause = f"it is given piece {other} of {len(whole.meta['val'])} in place of piece {index}"
                yield Hypothesis(cause, {node: from_node(whole, operator.itemgetter(other))})


def _of_embedding(replay: Replay) -> Iterator[Hypothesis]:
    """Soft tokens that stand elsewhere, or are not themselves; and vectors of places."""
    site, context = replay.site, replay.context
    soft = context.graph.inputs.get("soft")
    if soft in site.nodes and is_call(site.node, aten.where.self) and context.prompt.blocks():
        cause = "soft tokens are left out: their places are read as text"
        yield Hypothesis(cause, {site.node: from_node(site.node.args[2])})
        for _, _, factor in scalars_of(site):
            cause = f"soft tokens are multiplied by the embedding's factor {factor:g}"
            yield Hypothesis(cause, {soft: from_node(soft, partial(torch.mul, other=factor))})
        yield from (Hypothesis(cause, {soft: from_node(soft, order)}) for cause, order in _places(replay))
    for table in [node for node in replay.weights() if node in site.node.args]:
        other = next(node for node in site.node.args if node is not table)
        yield Hypothesis("positions have no vectors of their own", {site.node: from_node(other)})
        cause = "the vectors of positions are added twice"
        yield Hypothesis(cause, {table: from_node(table, lambda value: 2 * value)})
        cause = "rows and columns of the vectors of positions are swapped"
        yield Hypothesis(cause, {table: from_node(table, _grid_transposed)})


def _places(replay: Replay) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Where soft tokens [1, T, D] may stand in place of their own places."""
    images = [torch.arange(*block) for block in replay.context.prompt.blocks()]
    at = torch.cat(images)

    def taken(source: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        return soft.index_copy(1, at, soft[:, source])

    def from_start(soft: torch.Tensor) -> torch.Tensor:
        moved = torch.zeros_like(soft)
        for call in replay.calls:
            inside = at[(at >= call.start) & (at < call.stop)]
            moved[:, call.start : call.start + len(inside)] = soft[:, inside]
        return moved

    for shift, words in ((1, "late"), (-1, "early")):
        yield f"soft tokens stand one position too {words}", partial(torch.roll, shifts=shift, dims=1)
    yield "images stand last to first", partial(taken, torch.cat(images[::-1]))
    yield "every image has the soft tokens of the first", partial(taken, torch.cat(images[:1] * len(images)))
    yield "soft tokens stand at the beginning of a call, not in their places", from_start


def _of_average(replay: Replay) -> Iterator[Hypothesis]:
    yield Hypothesis("rows and columns of the averages are swapped", output=_grid_transposed)
    for node in replay.site.calls(aten.mean.dim):
        x, axes = node.args[:2]
        shape = x.meta["val"].shape
        for others in itertools.combinations(range(1, len(shape) - 1), len(axes)):
            if math.prod(shape[axis] for axis in others) == math.prod(shape[axis] for axis in axes):
                cause = f"averages are taken over axes {others} of {tuple(shape)} in place of {tuple(axes)}"
                yield Hypothesis(cause, {node: from_node(x, partial(_mean_as, node.meta["val"].shape, others))})
        cause = "the largest is taken in place of the average"
        yield Hypothesis(cause, {node: from_node(x, partial(torch.amax, dim=axes))})


def _mean_as(shape: torch.Size, axes: tuple[int, ...], value: torch.Tensor) -> torch.Tensor:
    return value.mean(axes).reshape(shape)


def _grid_transposed(rows: torch.Tensor) -> torch.Tensor:
    """Rows [side * side, ...] of a square, column after column; as they are if they are none."""
    side = math.isqrt(len(rows))
    if side * side != len(rows):
        return rows
    return rows.reshape(side, side, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)


def _of_output(replay: Replay) -> Iterator[Hypothesis]:
    """Mistakes that any operation can make."""
    x, y = (value.double().flatten().nan_to_num(0.0) for value in (replay.run(), replay.output))
    factor = float((x @ y) / (x @ x).clamp_min(1e-300))
    yield Hypothesis("the output is rounded to bfloat16", output=lambda value: value.bfloat16().float())
    yield Hypothesis("the output is rounded to float16", output=lambda value: value.half().float())
    yield Hypothesis("the output is all zeros", output=torch.zeros_like)
    yield Hypothesis(f"the output is multiplied by {factor:.6g}", output=lambda value: value * factor)
    for shift, words in ((1, "before"), (-1, "after")):
        cause = f"every position has the output of the position {words} it"
        yield Hypothesis(cause, output=partial(torch.roll, shifts=shift, dims=0))


_MAKERS: Mapping[str, Callable[[Replay], Iterator[Hypothesis]]] = {
    "activation": _of_activation,
    "average": _of_average,
    "embedding": _of_embedding,
    "norm": _of_norm,
    "residual": _of_residual,
    "rope": of_rope,
}
