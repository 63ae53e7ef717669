"""Another number where a call has one: a scale, an epsilon, a base, a factor, a cap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from transom.graphs.match import aten, is_call, skip_casts
from transom.graphs.node import Node, is_node
from transom.validation.bisection.attention import masking
from transom.validation.bisection.context import Site
from transom.validation.bisection.replay import Hypothesis, Replay, from_node, with_argument

EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
BASES = (1e4, 1e5, 5e5, 1e6)
FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
CAPS = (30.0, 50.0)

FITTED_ROWS = 16
"""Rows from the first that differs on, to which a number is fitted."""

_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


def of_scalars(replay: Replay) -> Iterator[Hypothesis]:
    """Likely numbers, those of other layers at the same place, and those that fit best."""
    elsewhere = _scalars_elsewhere(replay)
    fits = []
    for place, (node, index, number) in enumerate(scalars_of(replay.site)):
        what, likely = _role(replay, node, number)
        others = [other[place] for other in elsewhere if len(other) > place]
        for other, words in {**likely, **{other: likely.get(other, "") for other in others}}.items():
            if other != number:
                cause = words or f"{what} is {other:.6g} in place of {number:.6g}"
                yield Hypothesis(cause, {node: with_argument(node, index, other)})
        if number > 0 and is_call(node, *_PRODUCTS, aten.pow.Scalar):
            fits.append((node, index, number, what))
    for node, index, number, what in fits:
        fitted = _fit(replay, node, index, number)
        if fitted is not None:
            cause = f"{what} is {fitted:.4g} in place of {number:.4g}"
            yield Hypothesis(cause, {node: with_argument(node, index, fitted)})


def scalars_of(site: Site) -> list[tuple[Node, int, float]]:
    """Numbers that the computation contains, in order; not those that positions and shapes are made of."""
    return [
        (node, index, float(number))
        for node in site.calls(*_PRODUCTS, aten.add.Tensor, aten.sub.Tensor, aten.pow.Scalar, aten.layer_norm.default)
        if node.meta["val"].dtype.is_floating_point and not _is_cap(node)
        for index, number in enumerate(node.args)
        if isinstance(number, float) or (type(number) is int and node in site.moving)
    ]


def _scalars_elsewhere(replay: Replay) -> list[tuple[float, ...]]:
    """The numbers of the same site of other layers, each list once."""

    def in_layer(site: Site) -> str:
        return site.tap.name.replace(f".{site.tap.layer}.", ".N.", 1)

    site = replay.site
    others = [other for other in replay.context.sites(site.tap.op) if other.tap != site.tap]
    same = [other for other in others if in_layer(other) == in_layer(site)]
    return list(dict.fromkeys(tuple(number for _, _, number in scalars_of(other)) for other in same))


def _role(replay: Replay, node: Node, number: float) -> tuple[str, Mapping[float, str]]:
    """What a number is, and which others are likely in its place: with words of their own, or ""."""
    site, op = replay.site, replay.site.tap.op
    if is_call(node, aten.pow.Scalar):
        return "the RoPE base" if op == "rope" else "the base of a power", dict.fromkeys(BASES, "")
    if is_call(node, aten.layer_norm.default):
        return "the norm's epsilon", dict.fromkeys(EPSILONS, "")
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        if any(is_call(user, aten.rsqrt.default, aten.sqrt.default) for user in node.users):
            return "the norm's epsilon", dict.fromkeys(EPSILONS, "")
        if op == "norm" and number == 1 and next(filter(is_node, node.args), None) not in site.moving:
            doubled = "the norm multiplies by 2 + w: the 1 is added twice"
            return "what is added to w", {0.0: "the norm multiplies by w in place of 1 + w", 2.0: doubled}
        return "what is added", {0.0: ""}
    if op == "rope":
        return "the RoPE scaling factor", dict.fromkeys(FACTORS, "") | {1.0: "the RoPE scaling factor is missing"}
    if op == "attention":
        words = {
            1.0: f"the softmax scale is 1 in place of {number:.6g}: the scores are not scaled",
            number * number: f"the softmax scale {number:.6g} is applied twice",
        }
        return "the softmax scale", words | {width**-0.5: "" for width in sorted(_widths(site), reverse=True)}
    what = "the embedding" if op == "embedding" else "the value"
    return f"the factor of {what}", {
        1.0: f"{what} is not multiplied by {number:.6g}",
        number * number: f"{what} is multiplied by {number:.6g} twice",
        float(torch.tensor(number, dtype=torch.bfloat16)): f"the factor {number:.6g} is rounded to bfloat16",
    }


def _widths(site: Site) -> set[int]:
    """Last axes of a site's values, from 2 on."""
    values = [node.meta.get("val") for node in site.nodes]
    widths = [value.shape[-1] for value in values if isinstance(value, torch.Tensor) and value.dim()]
    return {width for width in widths if isinstance(width, int) and width > 1}


def _fit(replay: Replay, node: Node, index: int, number: float) -> float | None:
    """The number that comes closest to the output, by ever finer grids of its logarithm; None if it is its own.

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

    step = 0.5
    # The loss has one valley near the best of a coarse grid.
    best = min((step * index for index in range(-14, 15)), key=loss)
    while step > 2e-6:
        step /= 4
        best = min((best + step * index for index in range(-4, 5)), key=loss)
    return float(number * 2**best)


def _is_cap(node: Node) -> bool:
    """Whether a product is one of the two of `tanh(x / cap) * cap`."""
    return any(is_call(skip_casts(used), aten.tanh.default) for used in node.args[:1]) or any(
        is_call(user, aten.tanh.default) for user in node.users
    )


def of_caps(replay: Replay) -> Iterator[Hypothesis]:
    """A bound `tanh(x / cap) * cap` that is missing, another one, or one where the graph has none."""
    words = {"softmax": "scores", "logits": "logits"}.get(replay.site.op)
    if words is None:
        return
    # Attention bounds its scores before they are masked, the head its logits.
    place, tanhs = masking(replay.site), replay.site.calls(aten.tanh.default)
    x = bounded = replay.site.node if words == "logits" else place and place.scores
    if tanhs and is_call(tanhs[0].args[0], *_PRODUCTS):
        x, bounded = tanhs[0].args[0].args[0], next(iter(tanhs[0].users))
        yield Hypothesis(f"the {words} are not capped", {bounded: from_node(x)})
    if bounded is not None:
        for cap in CAPS:
            yield Hypothesis(f"the {words} are capped at {cap:g}", {bounded: from_node(x, _capped_at(cap))})


def _capped_at(cap: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: torch.tanh(value / cap) * cap
