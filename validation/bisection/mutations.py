"""What may be wrong at a site, as mutations of its part of the graph.

A cause is believed only if it reproduces the numbers that were seen. The first hypothesis of a site is that it does
what the graph says. All others change something that stands in the graph: a number, a weight, a call, an input, or
the output. Those of weights that are rounded and of attention's keys stand in files of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import gelu, silu

from transom.graphs.match import aten, is_call, skip_casts
from transom.graphs.node import Node, is_node
from transom.validation.bisection.attention import masking, of_attention, windows
from transom.validation.bisection.context import Rows, Site
from transom.validation.bisection.hypothesis import RIGHT, Hypothesis, best_factor
from transom.validation.bisection.replay import Change, Changes, Replay, scalars, with_argument
from transom.validation.bisection.rounding import of_rounding

EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
BASES = (1e4, 1e5, 5e5, 1e6)
FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CAPS = (30.0, 50.0)

FITTED_ROWS = 16
"""Rows from the first that differs on, to which a number is fitted."""

_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the exact gelu": gelu,
    "gelu in its tanh form": partial(gelu, approximate="tanh"),
    "silu": silu,
    "relu": torch.relu,
    "a sigmoid": torch.sigmoid,
}
_ACTIVATION_CALLS = (aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default)


def hypotheses(replay: Replay) -> Iterator[Hypothesis]:
    """Everything that may be the case at a site; first that it is right."""
    op = replay.site.op
    if op == "attention":
        yield from of_attention(replay)
        op = "softmax"
    else:
        yield Hypothesis(op=op, cause=RIGHT, predict=replay.run)
    makers = {"norm": _of_norm, "rope": _of_rope, "activation": _of_activation, "residual": _of_residual}
    if replay.site.op in makers:
        yield from makers[replay.site.op](replay)
    yield from _of_scalars(replay, op)
    yield from _of_caps(replay, op)
    yield from of_rounding(replay)
    yield from _of_weights(replay, op)
    yield from _of_output(replay, op)
    if replay.site.op == "projection":
        yield from _of_fitted_weights(replay)


def _guess(replay: Replay, op: str, cause: str, changes: Changes) -> Hypothesis:
    return Hypothesis(op=op, cause=cause, predict=lambda: replay.run(changes))


def _instead(node: Node) -> Change:
    """Another node's value."""
    return lambda value_of: value_of(node)


def _constant(value: torch.Tensor) -> Change:
    return lambda _: value


# Numbers


def _of_scalars(replay: Replay, op: str) -> Iterator[Hypothesis]:
    """Another number in a call: likely ones, those of other layers at the same place, and the one that fits best."""
    elsewhere = _scalars_elsewhere(replay)
    fits = []
    for place, (node, index, number) in enumerate(_scalars_of(replay.site)):
        what, likely, words = _role(replay, node, number)
        others = [other[place] for other in elsewhere if len(other) > place]
        tried = [other for other in dict.fromkeys((*likely, *others)) if other != number]
        for other in tried:
            change = with_argument(node, index, other)
            cause = words.get(other, f"{what} is {other:.6g} in place of {number:.6g}")
            yield _guess(replay, op, cause, {node: change})
        if number > 0 and is_call(node, *_PRODUCTS, aten.pow.Scalar):
            fits.append((node, index, number, what))
    for node, index, number, what in fits:
        fitted = _fit(replay, node, index, number)
        if fitted is not None:
            cause = f"{what} is {fitted:.4g} in place of {number:.4g}"
            yield _guess(replay, op, cause, {node: with_argument(node, index, fitted)})


def _scalars_of(site: Site) -> list[tuple[Node, int, float]]:
    """Numbers that the computation contains, in order; not those that positions and shapes are made of."""
    targets = (*_PRODUCTS, aten.add.Tensor, aten.sub.Tensor, aten.pow.Scalar)
    return [
        (node, index, number)
        for node in site.nodes
        if is_call(node, *targets) and node.meta["val"].dtype.is_floating_point and not _is_cap(node)
        for index, number in scalars(node).items()
        if node in site.moving or isinstance(node.args[index], float)
    ]


def _scalars_elsewhere(replay: Replay) -> list[list[float]]:
    """The numbers of the same site of other layers, each list once."""
    site = replay.site
    name = _in_layer(site)
    others = [other for other in replay.context.sites(site.op) if other.tap != site.tap and _in_layer(other) == name]
    return [
        list(numbers) for numbers in {tuple(number for _, _, number in _scalars_of(other)): None for other in others}
    ]


def _in_layer(site: Site) -> str:
    """The tap's name less the layer."""
    return site.tap.replace(f".{site.layer}.", ".N.", 1)


def _role(replay: Replay, node: Node, number: float) -> tuple[str, list[float], dict[float, str]]:
    """What a number is, which other numbers are likely in its place, and words for some of them."""
    site, x = replay.site, next((used for used in node.args if is_node(used)), None)
    if is_call(node, aten.pow.Scalar):
        return "the RoPE base" if site.op == "rope" else "the base of a power", list(BASES), {}
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        if any(is_call(user, aten.rsqrt.default, aten.sqrt.default) for user in node.users):
            return "the norm's epsilon", list(EPSILONS), {}
        if site.op == "norm" and number == 1 and x not in site.moving:
            doubled = "the norm multiplies by 2 + w: the 1 is added twice"
            return "what is added to w", [0.0, 2.0], {0.0: "the norm multiplies by w in place of 1 + w", 2.0: doubled}
        return "what is added", [0.0], {}
    if site.op == "rope":
        words = {1.0: "the RoPE scaling factor is missing"}
        return "the RoPE scaling factor", list(FACTORS), words if number != 1 else {}
    widths = {size for used in replay.site.nodes for size in _widths(used)}
    if site.op == "attention":
        likely = [1.0, number * number, *sorted(size**-0.5 for size in widths if size > 1)]
        missing = f"the softmax scale is 1 in place of {number:.6g}: the scores are not scaled"
        return (
            "the softmax scale",
            likely,
            {1.0: missing, number * number: f"the softmax scale {number:.6g} is applied twice"},
        )
    likely = [1.0, number * number, float(torch.tensor(number, dtype=torch.bfloat16))]
    what = "the embedding" if site.op == "embedding" else "the value"
    words = {
        1.0: f"{what} is not multiplied by {number:.6g}",
        number * number: f"{what} is multiplied by {number:.6g} twice",
        likely[2]: f"the factor {number:.6g} is rounded to bfloat16",
    }
    return f"the factor of {what}", likely, words


def _widths(node: Node) -> set[int]:
    value = node.meta.get("val")
    return (
        {value.shape[-1]}
        if isinstance(value, torch.Tensor) and value.dim() and isinstance(value.shape[-1], int)
        else set()
    )


def _fit(replay: Replay, node: Node, index: int, number: float) -> float | None:
    """The number that comes closest to the output, by golden-section search on its logarithm; None if it is its own.

    Early rows tell enough, and most of a base or a scale, whose effect grows with the position.
    """
    change = (replay.run() - replay.output).abs().flatten(1).amax(1)
    telling = (change > replay.context.tolerance * replay.output.abs().max()).nonzero().flatten()
    if not len(telling):
        return None
    early = replay.first(int(telling[0]) + FITTED_ROWS)

    def loss(power: float) -> float:
        predicted = early.run({node: with_argument(node, index, number * 2**power)})
        return float((predicted - early.output).double().pow(2).nan_to_num(0.0).sum())

    # The loss has one valley near the best of a coarse grid.
    grid = [step / 2 for step in range(-14, 15)]
    best = min(grid, key=loss)
    low, high, ratio = best - 0.5, best + 0.5, (5**0.5 - 1) / 2
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return number * 2 ** ((low + high) / 2)


def _is_cap(node: Node) -> bool:
    """Whether a product is one of the two of `tanh(x / cap) * cap`."""
    return any(is_call(skip_casts(used), aten.tanh.default) for used in node.args[:1]) or any(
        is_call(user, aten.tanh.default) for user in node.users
    )


def _of_caps(replay: Replay, op: str) -> Iterator[Hypothesis]:
    """A bound `tanh(x / cap) * cap` that is missing, another one, or one where the graph has none."""
    node, words = replay.site.node, {"softmax": "scores", "logits": "logits"}.get(op)
    if words is None:
        return
    # Attention bounds its scores before they are masked, the head its logits.
    place = masking(replay.site)
    bounded = node if op == "logits" else place and place.scores
    tanh = next((each for each in replay.site.nodes if is_call(each, aten.tanh.default)), None)
    if tanh is not None and is_call(tanh.args[0], *_PRODUCTS):
        x, bounded = tanh.args[0].args[0], next(iter(tanh.users))
        yield _guess(replay, op, f"the {words} are not capped", {bounded: _instead(x)})
    elif bounded is not None:
        x = bounded
    else:
        return
    for cap in CAPS:
        capped: Change = lambda value_of, cap=cap, x=x: torch.tanh(value_of(x) / cap) * cap  # type: ignore[misc]  # noqa: E731
        yield _guess(replay, op, f"the {words} are capped at {cap:g}", {bounded: capped})


# Weights


def _of_weights(replay: Replay, op: str) -> Iterator[Hypothesis]:
    """The weights of another site of this operation, turned or left out."""
    context, weights = replay.context, replay.weights()
    names = set(weights.values())
    others = sorted({name for site in context.sites(replay.site.op) for name in _weight_names(replay, site)} - names)
    for node, name in weights.items():
        weight = context.graph.weights[name]
        for other in others:
            if context.graph.weights[other].shape == weight.shape:
                belongs = "the norm has the weight of" if op == "norm" else "the weights are those of"
                cause = f"{belongs} {other.removesuffix('.weight')}"
                change: Change = lambda _, other=other: context.rows(other).read()  # type: ignore[misc]  # noqa: E731
                yield _guess(replay, op, cause, {node: context.rows(other) if len(weight.shape) > 1 else change})
        if op == "projection" and len(weight.shape) == 1:
            yield _guess(replay, op, "the bias is left out", {node: lambda value_of, node=node: value_of(node) * 0})  # type: ignore[misc]
        if op == "projection" and len(set(weight.shape)) < len(weight.shape):
            turned = Rows(weight=weight, change=lambda _, name=name: context.rows(name).read().T)  # type: ignore[misc]
            yield _guess(replay, op, "the weights are transposed", {node: turned})
    head = next((node for node in replay.site.nodes if is_call(node, aten.linear.default)), None)
    if op == "logits" and head is not None:
        width = head.args[0].meta["val"].shape[-1] ** 0.5
        change = lambda value_of: value_of(head) * width  # noqa: E731
        yield _guess(replay, op, "the head has the embedding's factor", {head: change})


def _weight_names(replay: Replay, site: Site) -> set[str]:
    names = replay.context.weight_names
    return {names[node.name] for node in site.nodes if node.op == "placeholder" and node.name in names}


def _of_fitted_weights(replay: Replay) -> Iterator[Hypothesis]:
    """A bias that is added, and the weights that would give the output."""
    right, y = replay.run(), replay.output
    error = (y - right).flatten(1)
    bias = error.median(0).values.view_as(right[0])
    yield Hypothesis(op="projection", cause="a bias is added", predict=lambda: right + bias)
    rows = (error.abs().amax(0) > replay.context.tolerance * y.abs().amax()).nonzero().flatten().tolist()
    count, (x,) = error.shape[1], replay.inputs.values()
    words = f"{len(rows)} of {count} output rows differ (first {rows[0] if rows else 0})"
    x = x.flatten(1)
    if x.shape[0] >= 1.2 * x.shape[1]:
        change = torch.linalg.lstsq(x.double(), error.double()).solution.float()
        cause = (
            f"the weights are not the checkpoint's: {words}, the largest change of a weight is {change.abs().max():.3g}"
        )
        yield Hypothesis(op="projection", cause=cause, predict=lambda: right + (x @ change).view_as(right))
    elif 0 < len(rows) < count:
        mended = right.flatten(1).clone()
        mended[:, rows] = y.flatten(1)[:, rows]
        yield Hypothesis(op="projection", cause=f"the weights of {words}", predict=lambda: mended.view_as(right))


# Calls


def _of_norm(replay: Replay) -> Iterator[Hypothesis]:
    site, guess = replay.site, partial(_guess, replay, "norm")
    for node in site.nodes:
        if is_call(node, aten.mul.Tensor) and node in site.moving:
            x = [side for side in node.args[:2] if side in site.moving]
            if len(x) == 1 and is_node(node.args[0]) and is_node(node.args[1]):
                yield guess("the norm has no weight", {node: _instead(x[0])})
        if is_call(node, aten.rsqrt.default) and node in site.moving:
            ones: Change = lambda value_of, node=node: torch.ones_like(value_of(node))  # type: ignore[misc]  # noqa: E731
            yield guess("there is no norm: its input is only multiplied by the weight", {node: ones})
    ((source, value),) = replay.inputs.items()
    value = value.reshape(replay.output.shape)
    yield Hypothesis(op="norm", cause="there is no norm: its input comes out", predict=lambda: value)
    centred = {source: value - value.mean(-1, keepdim=True)}
    cause = "the norm subtracts the mean, as LayerNorm does"
    yield Hypothesis(op="norm", cause=cause, predict=lambda: replay.run(inputs=centred))


def _of_activation(replay: Replay) -> Iterator[Hypothesis]:
    site, guess = replay.site, partial(_guess, replay, "activation")
    activation = next((node for node in site.nodes if is_call(node, *_ACTIVATION_CALLS)), None)
    if activation is not None:
        x = activation.args[0]
        for words, function in _ACTIVATIONS.items():
            change: Change = lambda value_of, function=function: function(value_of(x))  # type: ignore[misc]  # noqa: E731
            yield guess(f"the activation is {words} in place of {_called(activation)}", {activation: change})
        yield guess("there is no activation", {activation: _instead(x)})
    weights = [node for node in replay.weights() if node.meta["val"].dim() == 2]
    if len(weights) == 2 and weights[0].meta["val"].shape == weights[1].meta["val"].shape:
        swapped = [replay.context.rows(replay.weights()[node]) for node in reversed(weights)]
        yield guess("gate and up are swapped", dict(zip(weights, swapped, strict=True)))
    product: Node = site.node
    if is_call(product, aten.mul.Tensor):
        left, right = product.args[:2]
        added: Change = lambda value_of: value_of(left) + value_of(right)  # noqa: E731
        yield guess("gate and up are added in place of multiplied", {product: added})


def _called(activation: Node) -> str:
    if is_call(activation, aten.gelu.default):
        return "gelu in its tanh form" if activation.kwargs.get("approximate") == "tanh" else "the exact gelu"
    return str(activation.target).split(".")[1]


def _of_residual(replay: Replay) -> Iterator[Hypothesis]:
    ops = {node: tap.op for tap, node in replay.context.taps.values()}
    # The stream is what was a sum, or the embedding, before.
    ordered = sorted(replay.inputs.items(), key=lambda item: ops[item[0]] not in ("residual", "embedding"))
    if len(ordered) != 2:
        return
    (_, stream), (_, branch) = ((node, value.view_as(replay.output)) for node, value in ordered)
    for cause, a, b in (
        ("the branch is not added: the stream comes out as it was", 1, 0),
        ("the stream is lost: only the branch comes out", 0, 1),
        ("the branch is added twice", 1, 2),
        ("the stream is added twice", 2, 1),
        ("the branch is subtracted", 1, -1),
    ):
        yield Hypothesis(op="residual", cause=cause, predict=lambda a=a, b=b: a * stream + b * branch)  # type: ignore[misc]


# Positions


def _of_rope(replay: Replay) -> Iterator[Hypothesis]:
    """The angles of another layer, other positions, other pairs."""
    at, guess, context = replay.positions, partial(_guess, replay, "rope"), replay.context
    restarted = torch.cat([torch.arange(count) for _, count in replay.calls])
    moved = [
        ("RoPE's positions are one too large", at + 1),
        ("RoPE's positions are one too small", at - 1),
        ("RoPE's positions start again at 0 in every call", restarted),
        ("RoPE rotates the other way", -at),
    ]
    layers = windows(context, len(at))
    yield from _of_angles(replay, layers)
    for window in sorted({window for window in layers.values() if window is not None}):
        moved.append((f"RoPE's positions wrap at the window of {window}", at % window))
    counted = next((node for node in replay.site.nodes if _counts_positions(context.graph.inputs["start"], node)), None)
    for cause, positions in moved if counted is not None else ():
        change: Change = lambda value_of, to=positions: to.view_as(value_of(counted))  # type: ignore[misc]  # noqa: E731
        yield guess(cause, {counted: change})
    ((source, x),) = replay.inputs.items()
    heads = x.reshape(replay.output.shape)
    yield Hypothesis(op="rope", cause="there is no rotation", predict=lambda: heads)
    width = heads.shape[-1]
    apart = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))
    for order, cause in (
        (apart, "RoPE rotates interleaved pairs (2 i, 2 i + 1) in place of halves"),
        (apart.argsort(), "RoPE rotates halves in place of interleaved pairs (2 i, 2 i + 1)"),
    ):
        yield Hypothesis(
            op="rope",
            cause=cause,
            predict=lambda order=order: replay.run(inputs={source: heads[..., order]})[..., order.argsort()],  # type: ignore[misc]
        )


def _of_angles(replay: Replay, layers: dict[int | None, int | None]) -> Iterator[Hypothesis]:
    """Whatever other layers make of positions takes the place of what this one does."""
    site = replay.site
    own, own_kind = site.constants(), _kind(layers, site)
    tried = [own]
    for other in replay.context.sites("rope"):
        angles = other.constants()
        if angles in tried or len(angles) != len(own):
            continue
        tried.append(angles)
        kind = _kind(layers, other)
        whose = f"{kind} layers" if kind != own_kind else f"layer {other.layer}"
        cause = (
            f"the {own_kind} layer is rotated with the RoPE base of {whose}: {_words(other)} in place of {_words(site)}"
        )
        # The other layer's part of the graph makes its angles, of this one's positions.
        elsewhere = Replay(site=other, context=replay.context, inputs={}, output=replay.output, calls=replay.calls)
        values = {mine: elsewhere.value(theirs) for mine, theirs in zip(own, angles, strict=True)}
        changes = {mine: _constant(value) for mine, value in values.items()}
        yield _guess(replay, "rope", cause, changes)


def _kind(layers: dict[int | None, int | None], site: Site) -> str:
    return "global" if layers.get(site.layer) is None else "local"


def _counts_positions(start: Node, node: Node) -> bool:
    """Whether a node is where the positions of the new tokens are made of the first one's."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return (
        start in node.all_input_nodes
        and node.op == "call_function"
        and any(not isinstance(size, int) for size in shape)
    )


def _words(site: Site) -> str:
    """Base and factor of a rotation."""
    numbers = [(node, number) for node, _, number in _scalars_of(site) if node not in site.moving]
    base = next((number for node, number in numbers if is_call(node, aten.pow.Scalar)), None)
    factors = [number for node, number in numbers if is_call(node, aten.div.Tensor) and number != 1]
    words = "angles of its own" if base is None else f"theta {base:g}"
    return words + "".join(f" and factor {factor:g}" for factor in factors)


# The output


def _of_output(replay: Replay, op: str) -> Iterator[Hypothesis]:
    """Mistakes that any operation can make."""
    right = replay.run

    def guess(cause: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Hypothesis:
        return Hypothesis(op=op, cause=cause, predict=lambda: change(right()))

    factor = best_factor(right(), replay.output)
    yield guess("the output is rounded to bfloat16", lambda value: value.bfloat16().float())
    yield guess("the output is rounded to float16", lambda value: value.half().float())
    yield guess("the output is all zeros", torch.zeros_like)
    yield guess(f"the output is multiplied by {factor:.6g}", lambda value: value * factor)
    yield guess("every position has the output of the position before it", lambda value: value.roll(1, 0))
    yield guess("every position has the output of the position after it", lambda value: value.roll(-1, 0))
