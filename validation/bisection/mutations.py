"""What may be wrong at a site, as mutations of its part of the graph.

A cause is believed only if it reproduces the numbers that were seen. The first hypothesis of a site is that it does
what the graph says. All others change something that stands in the graph: a number, a weight, a call, an input, or
the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch.nn.functional import gelu, silu

from transom.graphs.match import aten, is_call
from transom.graphs.node import Node, is_node
from transom.validation.bisection.attention import of_attention
from transom.validation.bisection.replay import RIGHT, Hypothesis, Replay, from_node
from transom.validation.bisection.rope import of_rope
from transom.validation.bisection.scalars import of_caps, of_scalars
from transom.validation.bisection.weights import of_fitted_weights, of_rounding, of_weights

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
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
    makers = {"norm": _of_norm, "rope": of_rope, "activation": _of_activation, "residual": _of_residual}
    for maker in (makers.get(op), of_scalars, of_caps, of_rounding, of_weights, _of_output):
        if maker is not None:
            yield from maker(replay)
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
    centred = replay.in_graph(source, value - value.mean(-1, keepdim=True))
    yield Hypothesis("the norm subtracts the mean, as LayerNorm does", {source: lambda _: centred})


def _of_activation(replay: Replay) -> Iterator[Hypothesis]:
    site, context = replay.site, replay.context
    calls = site.calls(aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default)
    for node in calls[:1]:
        x = node.args[0]
        for words, function in _ACTIVATIONS.items():
            cause = f"the activation is {words} in place of {_called(node)}"
            yield Hypothesis(cause, {node: from_node(x, function)})
        yield Hypothesis("there is no activation", {node: from_node(x)})
    weights = {node: name for node, name in replay.weights().items() if node.meta["val"].dim() == 2}
    if len(weights) == 2 and len({node.meta["val"].shape for node in weights}) == 1:
        swapped = map(context.rows, reversed(weights.values()))
        yield Hypothesis("gate and up are swapped", dict(zip(weights, swapped, strict=True)))
    if is_call(site.node, aten.mul.Tensor):
        left, right = site.node.args[:2]
        cause = "gate and up are added in place of multiplied"
        yield Hypothesis(cause, {site.node: lambda value_of: value_of(left) + value_of(right)})


def _called(activation: Node) -> str:
    if is_call(activation, aten.gelu.default):
        return "gelu in its tanh form" if activation.kwargs.get("approximate") == "tanh" else "the exact gelu"
    return str(activation.target).split(".")[1]


def _of_residual(replay: Replay) -> Iterator[Hypothesis]:
    ops = {node: tap.op for tap, node in replay.context.taps.values()}
    # The stream is what was a sum, or the embedding, before.
    ordered = sorted(replay.inputs, key=lambda node: ops[node] not in ("residual", "embedding"))
    if len(ordered) != 2:
        return
    stream, branch = (replay.inputs[node].view_as(replay.output) for node in ordered)
    for cause, value in (
        ("the branch is not added: the stream comes out as it was", stream),
        ("the stream is lost: only the branch comes out", branch),
        ("the branch is added twice", stream + 2 * branch),
        ("the stream is added twice", 2 * stream + branch),
        ("the branch is subtracted", stream - branch),
    ):
        yield Hypothesis(cause, output=lambda _, value=value: value)  # type: ignore[misc]


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
