"""What may be wrong with a rotation: the angles of another layer, other positions, other pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch

from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.validation.bisection.attention import masks
from transom.validation.bisection.context import Site
from transom.validation.bisection.replay import Hypothesis, Replay, from_node
from transom.validation.bisection.scalars import scalars_of


def of_rope(replay: Replay) -> Iterator[Hypothesis]:
    """Every hypothesis of a rotation."""
    at = replay.positions
    layers = {layer: mask.reach or None for layer, mask in masks(replay.context).items()}
    moved = {
        "RoPE's positions are one too large": at + 1,
        "RoPE's positions are one too small": at - 1,
        "RoPE's positions start again at 0 in every call": torch.cat([torch.arange(len(c)) for c in replay.calls]),
        "RoPE rotates the other way": -at,
    }
    yield from _of_angles(replay, layers)
    for window in sorted({window for window in layers.values() if window is not None}):
        moved[f"RoPE's positions wrap at the window of {window}"] = at % window
    counted = next(filter(partial(_counts_positions, replay.context.graph.inputs["start"]), replay.site.nodes), None)
    for cause, positions in moved.items() if counted is not None else ():
        yield Hypothesis(cause, {counted: from_node(counted, positions.view_as)})
    ((source, x),) = replay.inputs.items()
    heads = x.reshape(replay.output.shape)
    yield Hypothesis("there is no rotation", output=lambda _: heads)
    width = heads.shape[-1]
    apart = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))
    for order, cause in (
        (apart, "RoPE rotates interleaved pairs (2 i, 2 i + 1) in place of halves"),
        (apart.argsort(), "RoPE rotates halves in place of interleaved pairs (2 i, 2 i + 1)"),
    ):
        ordered = replay.in_graph(source, heads[..., order])
        back = partial(torch.index_select, dim=-1, index=order.argsort())
        yield Hypothesis(cause, {source: lambda _, ordered=ordered: ordered}, back)  # type: ignore[misc]


def _of_angles(replay: Replay, layers: Mapping[int | None, int | None]) -> Iterator[Hypothesis]:
    """Whatever other layers make of positions takes the place of what this one does."""
    site = replay.site
    own, own_kind = _angles(site), _kind(layers, site)
    tried = [own]
    for other in replay.context.sites("rope"):
        angles = _angles(other)
        if angles in tried or len(angles) != len(own):
            continue
        tried.append(angles)
        kind = _kind(layers, other)
        whose = f"{kind} layers" if kind != own_kind else f"layer {other.tap.layer}"
        theirs, ours = _words(other), _words(site)
        cause = f"the {own_kind} layer is rotated with the RoPE base of {whose}: {theirs} in place of {ours}"
        if theirs == ours:
            cause = f"the {own_kind} layer is rotated with the angles of {whose}, whose RoPE base is the same"
        # The other layer's part of the graph makes its angles, of this one's positions.
        elsewhere = Replay(site=other, context=replay.context, inputs={}, output=replay.output, calls=replay.calls)
        values = {mine: elsewhere.value(theirs) for mine, theirs in zip(own, angles, strict=True)}
        yield Hypothesis(cause, {mine: lambda _, value=value: value for mine, value in values.items()})  # type: ignore[misc]


def _angles(site: Site) -> list[Node]:
    """Values that depend on positions and weights alone, where they meet those that depend on the inputs."""
    still = [node for node in site.nodes if node.op == "call_function" and node not in site.moving]
    return [node for node in still if any(user in site.moving for user in node.users)]


def _kind(layers: Mapping[int | None, int | None], site: Site) -> str:
    return "global" if layers.get(site.tap.layer) is None else "local"


def _counts_positions(start: Node, node: Node) -> bool:
    """Whether a node is where the positions of the new tokens are made of the first one's."""
    shape = getattr(node.meta.get("val"), "shape", ())
    is_counted = start in node.all_input_nodes and node.op == "call_function"
    return is_counted and any(not isinstance(size, int) for size in shape)


def _words(site: Site) -> str:
    """Base and factor of a rotation."""
    numbers = [(node, number) for node, _, number in scalars_of(site) if node not in site.moving]
    base = next((number for node, number in numbers if is_call(node, aten.pow.Scalar)), None)
    factors = [number for node, number in numbers if is_call(node, aten.div.Tensor) and number != 1]
    words = "angles of its own" if base is None else f"theta {base:g}"
    return words + "".join(f" and factor {factor:g}" for factor in factors)
