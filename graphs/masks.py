"""What an attention mask means, found by evaluating it.

The part of the graph that makes the mask is cut out and run on concrete sizes and positions that span several windows
(`graphs.mask_points`). It is accepted only if it equals a known family at every one of them; otherwise nothing is
claimed about it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch.fx.node import map_arg

from transom.graphs import ops
from transom.graphs.graph import Graph, run_nodes
from transom.graphs.mask_points import (
    LARGEST_AREA,
    Point,
    UnreadableMaskError,
    far_points,
    full_points,
    grid,
    reach_of,
    telling_point,
    whole_numbers,
    with_blocks,
)
from transom.graphs.match import arguments, aten, is_call, upstream
from transom.graphs.node import Node

MASKED = -1e4
"""An additive mask must be 0 where a key is seen, and at most this where it is not."""

_UNKNOWN = "the mask is neither causal nor a causal window, nor one of these by segments or dilated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskReading:
    """What a mask means, or the reason why nothing can be said.

    Attributes:
        mask: Which of the earlier keys a query sees; None if the mask was not recognised.
        until: The input that says how far each query sees; None if as far as its own position.
        reason: Why the mask was not recognised.
    """

    mask: ops.Mask | None
    until: Node | None = None
    reason: str = ""


def read_mask(graph: Graph, mask: Node, tokens: Any, slots: Any, *, cached: bool) -> MaskReading:
    """Find which keys a mask lets a query see.

    Args:
        graph: The graph that the mask stands in.
        mask: Node of the mask, broadcastable to [B, N, T, S]: bool (True: seen) or additive.
        tokens: T as the graph knows it, a number or a symbol.
        slots: S as the graph knows it.
        cached: Whether keys stand in a cache's slots (position p in slot p % S) or in their own order (S is T).
    """
    inputs, until = _value_inputs(mask), graph.inputs.get("until")
    if unknown := sorted(node.name for node in inputs if node not in (graph.inputs.get("start"), until)):
        return MaskReading(mask=None, reason=f"the mask depends on the values of {', '.join(unknown)}")
    if until not in inputs:
        until = None
    reach = reach_of(mask)
    try:
        telling = telling_point(reach, tokens, slots, cached=cached)
        last_row, last = _evaluate(graph, mask, telling, tokens, slots)[-1:], telling.start + telling.tokens - 1
        keys = ops.slot_positions(telling.start, telling.tokens, telling.slots)
        left = list(candidates(last_row, torch.tensor([last]), keys, whole_numbers(mask)))
        edges = {size for known in left for size in (known.window, known.segment, known.dilation)}
        points = [telling, *grid(reach, edges, tokens, slots, cached=cached)]
        points += far_points(whole_numbers(mask), tokens, slots) if cached else full_points(mask, tokens, points)
        if until is not None:
            points += [with_block for point in points for with_block in with_blocks(point, max(edges, default=0))]
        for point in points:
            seen = _evaluate(graph, mask, point, tokens, slots)
            left = [
                known
                for known in left
                if torch.equal(seen, ops.visible(point.start, point.tokens, point.slots, known, point.until_T))
            ]
            if not left:
                reason = f"{_UNKNOWN}: see {point}"
                return MaskReading(mask=None, reason=reason)
    except UnreadableMaskError as error:
        return MaskReading(mask=None, reason=str(error))
    # Where the graph fixes sizes that tell them apart nowhere, the simplest.
    return MaskReading(mask=left[0], until=until)


def candidates(
    seen_TS: torch.Tensor, positions_T: torch.Tensor, keys_S: torch.Tensor, sizes: Collection[int]
) -> Iterator[ops.Mask]:
    """Masks that agree with what some queries see, the simplest first.

    Args:
        seen_TS: Which keys each query sees.
        positions_T: Positions of the queries.
        keys_S: Positions of the keys; negative means empty.
        sizes: Lengths of segments to be tried, and dilations where no query sees more than itself.
    """
    distances = (positions_T[:, None] - keys_S)[seen_TS]
    if not len(distances):
        return
    dilation, reach = math.gcd(*distances.tolist()), int(distances.max()) + 1
    dilations = [dilation] if dilation else sorted({1, *sizes})
    bounds = [{}, {"window": reach}, *({"segment": size} for size in sorted(sizes))]
    for mask in (ops.Mask(**bound, dilation=dilation) for bound in bounds for dilation in dilations):
        if torch.equal(ops.seen(keys_S, positions_T, mask), seen_TS):
            yield mask


def mask_of(node: Node) -> ops.Mask:
    """The mask of a call of `ops.ATTENTION` or `ops.ATTEND`."""
    given = arguments(node)
    return ops.Mask(**{field.name: given[field.name] for field in dataclasses.fields(ops.Mask)})


def structure(graph: Graph, mask: Node) -> tuple[str, ...]:
    """All that a mask's reading depends on, beside the sizes: masks of equal structure have equal values.

    Every operation upstream with its arguments, in which operations stand as numbers in the order of a walk that the
    arguments alone determine. Inputs whose values count stand there by name, others by their dtype and shape.
    """
    nodes, names = upstream(mask), {node: name for name, node in graph.inputs.items()}
    by_value, places = set(_value_inputs(mask)), {node: _Place(index=index) for index, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        value = node.meta.get("val")
        if node.op != "placeholder":
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: places[used])  # type: ignore[arg-type, return-value]
            lines.append(repr((node.op, str(node.target), args, kwargs)))
        elif node in by_value or node not in names or not isinstance(value, torch.Tensor):
            lines.append(repr((node.op, node.name)))
        else:
            lines.append(repr((node.op, value.dtype, [str(size) for size in value.shape])))
    return tuple(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    index: int


def _value_inputs(mask: Node) -> list[Node]:
    """Inputs whose numbers (not only whose sizes) the mask depends on."""
    inputs: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = [mask]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            if isinstance(node.meta.get("val"), torch.Tensor):
                inputs[node] = None
        elif not is_call(node, aten.sym_size.int):
            stack.extend(node.all_input_nodes)
    return list(inputs)


def _evaluate(graph: Graph, mask: Node, point: Point, tokens: Any, slots: Any) -> torch.Tensor:
    """The mask as bool [T, S] at one point of the grid."""
    if point.tokens * point.slots > LARGEST_AREA:
        raise UnreadableMaskError(f"the mask is too large to be evaluated at {point}")
    try:
        sizes = {str(tokens): point.tokens, str(slots): point.slots}
        value = evaluate(graph, mask, sizes, point.start, until=point.until_T)
    except Exception as error:  # whatever an op raises on sizes it was not traced for
        raise UnreadableMaskError(f"the mask cannot be evaluated by itself: {error}") from error
    if value.dtype != torch.bool:
        seen, hidden = value == 0, value <= MASKED
        if not bool((seen | hidden).all()):
            raise UnreadableMaskError("the mask adds a bias, it does not only hide keys")
        value = seen
    if any(size != 1 for size in value.shape[:-2]):
        rows = value.flatten(0, -3)
        if not bool((rows == rows[:1]).all()):
            raise UnreadableMaskError("the mask differs between batch rows or heads")
        value = rows[0]
    if any(size not in (1, wanted) for size, wanted in zip(value.shape[-2:], (point.tokens, point.slots), strict=True)):
        raise UnreadableMaskError(f"the mask is {list(value.shape[-2:])} where {point} was expected")
    return value.reshape(value.shape[-2:]).expand(point.tokens, point.slots)


def evaluate(
    graph: Graph, node: Node, sizes: Mapping[str, int], start: int, *, until: torch.Tensor | None = None
) -> torch.Tensor:
    """Evaluate a node that depends on sizes and positions only.

    Args:
        graph: The graph that the node stands in.
        node: What to evaluate.
        sizes: Numbers for the symbols of the inputs' shapes; any other symbol is 1.
        start: Position of the first new token.
        until: Last position that each new token sees, where the node depends on it.
    """
    needed, positions = set(upstream(node)), {"start": torch.tensor(start), "until": until}
    known = {
        used: _stand_in(used, sizes) if positions.get(name) is None else positions[name]
        for name, used in graph.inputs.items()
        if used in needed
    }
    value = run_nodes([node], known)[node]
    assert isinstance(value, torch.Tensor)
    return value


def _stand_in(node: Node, sizes: Mapping[str, int]) -> Any:
    """A value for an input: the right shape without any memory behind it."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return value
    shape = [size if isinstance(size, int) else sizes.get(str(size), 1) for size in value.shape]
    return torch.zeros((), dtype=value.dtype).expand(shape)


def depends_on_values(graph: Graph, node: Node) -> bool:
    """Whether a node depends on any input's numbers other than the start position."""
    position = graph.inputs.get("start")
    return any(used is not position for used in _value_inputs(node))
