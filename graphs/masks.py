"""What an attention mask means, found by evaluating it.

The part of the graph that makes the mask is cut out and run on concrete sizes and positions that span several windows.
It is accepted only if it equals a known family at every point of that grid; otherwise nothing is claimed about it.
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
from transom.graphs.match import LAYOUT, arguments, aten, is_call
from transom.graphs.node import Node

LARGEST_WINDOW = 2**17
LARGEST_AREA = 2**26
"""Entries of the largest mask that is evaluated; beyond that nothing is claimed about a mask."""

FARTHEST = 2**20
"""Positions up to which a mask over caches is looked at, whatever numbers its graph mentions."""

MASKED = -1e4
"""An additive mask must be 0 where a key is seen, and at most this where it is not."""

_UNKNOWN = "the mask is neither causal nor a causal window, nor one of these by segments or dilated"

_SHIFTS = (aten.__lshift__.Scalar, aten.__rshift__.Scalar)

_SCALING = (aten.mul.Tensor, aten.div.Tensor, aten.div.Tensor_mode, aten.floor_divide.default, *_SHIFTS)

_CURVED = {"pow", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "tanh"}
"""Operations whose results do not tell how far apart the positions are at which they pass a number."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Point:
    start: int
    tokens: int
    slots: int
    block: int = 0
    """Length of the blocks whose tokens see each other; 0 if there are none."""

    @property
    def until_T(self) -> torch.Tensor:
        """Last position that each token sees: a block is at the end of the new tokens, and one before if it fits."""
        until = self.start + torch.arange(self.tokens)
        for stop in (self.tokens, self.tokens - self.block - 1) if self.block else ():
            until[max(0, stop - self.block) : max(0, stop)] = self.start + stop - 1
        return until


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
    reach = _reach(mask)
    try:
        telling = _telling_point(reach, tokens, slots, cached=cached)
        last_row, last = _evaluate(graph, mask, telling, tokens, slots)[-1:], telling.start + telling.tokens - 1
        keys = ops.slot_positions(telling.start, telling.tokens, telling.slots)
        left = list(candidates(last_row, torch.tensor([last]), keys, _whole_numbers(mask)))
        edges = {size for known in left for size in (known.window, known.segment, known.dilation)}
        points = [telling, *_grid(reach, edges, tokens, slots, cached=cached)]
        points += _far_points(_whole_numbers(mask), tokens, slots) if cached else _full_points(mask, tokens, points)
        if until is not None:
            points += [with_block for point in points for with_block in _with_blocks(point, max(edges, default=0))]
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
    except _UnreadableMaskError as error:
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
    nodes, names = _upstream(mask), {node: name for name, node in graph.inputs.items()}
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


class _UnreadableMaskError(Exception):
    pass


def _telling_point(reach: int, tokens: Any, slots: Any, *, cached: bool) -> _Point:
    """A long history, so that a window shows."""
    fixed_tokens, fixed_slots = (size if isinstance(size, int) else None for size in (tokens, slots))
    if not cached:
        size = fixed_tokens or _span(reach)
        return _Point(start=0, tokens=size, slots=size)
    return _Point(start=2 * _span(reach), tokens=fixed_tokens or 1, slots=fixed_slots or _span(reach) + reach)


def _grid(reach: int, sizes: Collection[int], tokens: Any, slots: Any, *, cached: bool) -> Iterator[_Point]:
    """Points to compare at: the edges of a mask's sizes and of the reach, and histories that wrap around the slots.

    Sizes that the graph fixes stay as they are.
    """
    fixed_tokens, fixed_slots = (size if isinstance(size, int) else None for size in (tokens, slots))
    edges = sorted({max(1, around + d) for around in (reach, *sizes) for d in (-1, 0, 1)} | {1, 2, 5})
    span = _span(reach)
    if not cached:
        for size in {*edges, span, min(3 * max(sizes, default=0) + 5, span)}:
            count = fixed_tokens or size
            yield _Point(start=0, tokens=count, slots=count)
        return
    for width in (fixed_slots or span + reach, fixed_slots or span + 5):
        for start in (0, *edges, width - 2, width, width + 3, 3 * width + 1):
            for count in (1, 5, edges[-1]):
                yield _Point(start=start, tokens=fixed_tokens or min(count, width), slots=width)


def _far_points(sizes: Collection[int], tokens: Any, slots: Any) -> Iterator[_Point]:
    """Few tokens, far from the start, that look back over all that the graph can hold.

    A mask may change at positions that no number of its graph gives away. These points are spread over all sizes of
    numbers, on both sides of what segments and dtypes of few bits are likely to end at.
    """
    fixed_tokens, fixed_slots = (size if isinstance(size, int) else None for size in (tokens, slots))
    count = fixed_tokens or 5
    widest = min(_most(slots), LARGEST_AREA // 8 // count)
    powers = [2**exponent for exponent in range(5, FARTHEST.bit_length())]
    ends = {end for size in sizes for end in (size, 5 * size)} if len(sizes) < 32 else set(sizes)
    for end in sorted({*ends, *powers, *(power * 5 // 7 for power in powers)}):
        start = max(0, end - count // 2)
        yield _Point(start=start, tokens=count, slots=fixed_slots or max(1, min(start + count, widest)))


def _full_points(mask: Node, tokens: Any, points: Collection[_Point]) -> Iterator[_Point]:
    """As many tokens as the graph takes, where that is no large mask.

    Raises:
        _UnreadableMaskError: It is one, and where the mask changes cannot be told from its numbers.
    """
    most = _most(tokens)
    if most <= 2048:
        yield _Point(start=0, tokens=most, slots=most)
        return
    tried = max(point.tokens for point in points)
    for node in _upstream(mask):
        name = getattr(node.target, "__name__", "").split(".")[0].strip("_")
        large = (value for value in _numbers(node) if abs(value) > LARGEST_WINDOW)
        if name in _CURVED or (
            name in ("lt", "le", "gt", "ge", "eq", "ne", "floor_divide", "remainder") and any(large)
        ):
            raise _UnreadableMaskError(
                f"the mask may change beyond the {tried} tokens at which it was evaluated, by {node.name}"
            )


def _most(size: Any) -> int:
    """Largest number that a size may be, as far as positions are looked at."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).upper
    return min(int(bound), FARTHEST) if bound.is_finite else FARTHEST


def _with_blocks(point: _Point, window: int) -> Iterator[_Point]:
    """The point with blocks of tokens that see each other: shorter than the window, longer, and all of the tokens."""
    for block in sorted({2, max(2, window // 2), window + 1, point.tokens}):
        if 1 < block <= point.tokens:
            yield dataclasses.replace(point, block=block)


def _reach(mask: Node) -> int:
    """The farthest distance at which something can change, judging by the numbers that the mask's subgraph mentions.

    A distance may be compared with a number after it was multiplied or divided, so those factors count as well; not
    where quotients are compared with each other, which change at the edges of segments.
    """
    reach, factors = 16.0, 1.0
    for node in _upstream(mask):
        for value in _numbers(node):
            if not 0 < abs(value) <= LARGEST_WINDOW:
                continue
            if is_call(node, *_SCALING) and not _is_compared(node):
                factors *= max(abs(value), 1 / abs(value))
            else:
                reach = max(reach, abs(value))
    return math.ceil(min(reach * factors, LARGEST_WINDOW))


def _is_compared(node: Node) -> bool:
    """Whether a value is only asked whether it equals another one."""
    equal = aten.eq.Tensor, aten.ne.Tensor
    return all(is_call(user, *equal) or (is_call(user, *LAYOUT) and _is_compared(user)) for user in node.users)


def _whole_numbers(mask: Node) -> set[int]:
    """Sizes that the mask's subgraph mentions."""
    values = {value for node in _upstream(mask) for value in _numbers(node)}
    return {value for value in values if type(value) is int and 0 < value <= LARGEST_WINDOW}


def _numbers(node: Node) -> list[int | float]:
    """Numbers among a call's arguments and in lists there; of a shift, what it multiplies or divides by."""
    values = list[int | float]()
    for given in (*node.args, *node.kwargs.values()):
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                values.append(2**value if is_call(node, *_SHIFTS) and 0 <= value < 64 else value)
    return values


def _span(reach: int) -> int:
    """Three windows; less where that would take gigabytes, but always past the edge."""
    return max(reach + 5, min(3 * reach, 2048))


def _upstream(node: Node) -> list[Node]:
    nodes: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in nodes:
            nodes[current] = None
            stack.extend(current.all_input_nodes)
    return list(nodes)


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


def _evaluate(graph: Graph, mask: Node, point: _Point, tokens: Any, slots: Any) -> torch.Tensor:
    """The mask as bool [T, S] at one point of the grid."""
    if point.tokens * point.slots > LARGEST_AREA:
        raise _UnreadableMaskError(f"the mask is too large to be evaluated at {point}")
    try:
        sizes = {str(tokens): point.tokens, str(slots): point.slots}
        value = evaluate(graph, mask, sizes, point.start, until=point.until_T)
    except Exception as error:  # whatever an op raises on sizes it was not traced for
        raise _UnreadableMaskError(f"the mask cannot be evaluated by itself: {error}") from error
    if value.dtype != torch.bool:
        seen, hidden = value == 0, value <= MASKED
        if not bool((seen | hidden).all()):
            raise _UnreadableMaskError("the mask adds a bias, it does not only hide keys")
        value = seen
    if any(size != 1 for size in value.shape[:-2]):
        rows = value.flatten(0, -3)
        if not bool((rows == rows[:1]).all()):
            raise _UnreadableMaskError("the mask differs between batch rows or heads")
        value = rows[0]
    if any(size not in (1, wanted) for size, wanted in zip(value.shape[-2:], (point.tokens, point.slots), strict=True)):
        raise _UnreadableMaskError(f"the mask is {list(value.shape[-2:])} where {point} was expected")
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
    needed, positions = set(_upstream(node)), {"start": torch.tensor(start), "until": until}
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
