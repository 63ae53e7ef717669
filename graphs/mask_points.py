"""At which sizes and positions a mask is evaluated: where a known family, or anything else, would show.

Distances are judged by the numbers that the mask's part of the graph mentions, and positions are tried far beyond, as
some operations hide the numbers at which they change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch

from transom.graphs.match import LAYOUT, aten, is_call, upstream
from transom.graphs.node import Node

LARGEST_WINDOW = 2**17
LARGEST_AREA = 2**26
"""Entries of the largest mask that is evaluated; beyond that nothing is claimed about a mask."""

FARTHEST = 2**20
"""Positions up to which a mask over caches is looked at, whatever numbers its graph mentions."""

_SHIFTS = (aten.__lshift__.Scalar, aten.__rshift__.Scalar)

_SCALING = (aten.mul.Tensor, aten.div.Tensor, aten.div.Tensor_mode, aten.floor_divide.default, *_SHIFTS)

_CURVED = {"pow", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "tanh"}
"""Operations whose results do not tell how far apart the positions are at which they pass a number."""


class UnreadableMaskError(Exception):
    """A mask of which nothing is claimed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Where a mask is evaluated.

    Attributes:
        start: Position of the first new token.
        tokens: New tokens.
        slots: Slots of the cache; as many as tokens where keys stand in their own order.
        block: Length of the blocks whose tokens see each other; 0 if there are none.
    """

    start: int
    tokens: int
    slots: int
    block: int = 0

    @property
    def until_T(self) -> torch.Tensor:
        """Last position that each token sees: a block is at the end of the new tokens, and one before if it fits."""
        until = self.start + torch.arange(self.tokens)
        for stop in (self.tokens, self.tokens - self.block - 1) if self.block else ():
            until[max(0, stop - self.block) : max(0, stop)] = self.start + stop - 1
        return until


def telling_point(reach: int, tokens: Any, slots: Any, *, cached: bool) -> Point:
    """A long history, so that a window shows."""
    fixed_tokens, fixed_slots = (size if isinstance(size, int) else None for size in (tokens, slots))
    if not cached:
        size = fixed_tokens or _span(reach)
        return Point(start=0, tokens=size, slots=size)
    return Point(start=2 * _span(reach), tokens=fixed_tokens or 1, slots=fixed_slots or _span(reach) + reach)


def grid(reach: int, sizes: Collection[int], tokens: Any, slots: Any, *, cached: bool) -> Iterator[Point]:
    """Points to compare at: the edges of a mask's sizes and of the reach, and histories that wrap around the slots.

    Sizes that the graph fixes stay as they are.
    """
    fixed_tokens, fixed_slots = (size if isinstance(size, int) else None for size in (tokens, slots))
    edges = sorted({max(1, around + d) for around in (reach, *sizes) for d in (-1, 0, 1)} | {1, 2, 5})
    span = _span(reach)
    if not cached:
        for size in {*edges, span, min(3 * max(sizes, default=0) + 5, span)}:
            count = fixed_tokens or size
            yield Point(start=0, tokens=count, slots=count)
        return
    for width in (fixed_slots or span + reach, fixed_slots or span + 5):
        for start in (0, *edges, width - 2, width, width + 3, 3 * width + 1):
            for count in (1, 5, edges[-1]):
                # Fewer tokens look back as far.
                fitting = count if count * width <= LARGEST_AREA else max(1, LARGEST_AREA // 8 // width)
                yield Point(start=start, tokens=fixed_tokens or min(fitting, width), slots=width)


def far_points(sizes: Collection[int], tokens: Any, slots: Any) -> Iterator[Point]:
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
        yield Point(start=start, tokens=count, slots=fixed_slots or max(1, min(start + count, widest)))


def full_points(mask: Node, tokens: Any, points: Collection[Point]) -> Iterator[Point]:
    """As many tokens as the graph takes, where that is no large mask.

    Raises:
        UnreadableMaskError: It is one, and where the mask changes cannot be told from its numbers.
    """
    most = _most(tokens)
    if most <= 2048:
        yield Point(start=0, tokens=most, slots=most)
        return
    tried = max(point.tokens for point in points)
    for node in upstream(mask):
        name = getattr(node.target, "__name__", "").split(".")[0].strip("_")
        large = (value for value in _numbers(node) if abs(value) > LARGEST_WINDOW)
        if name in _CURVED or (
            name in ("lt", "le", "gt", "ge", "eq", "ne", "floor_divide", "remainder") and any(large)
        ):
            raise UnreadableMaskError(
                f"the mask may change beyond the {tried} tokens at which it was evaluated, by {node.name}"
            )


def _most(size: Any) -> int:
    """Largest number that a size may be, as far as positions are looked at."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).upper
    return min(int(bound), FARTHEST) if bound.is_finite else FARTHEST


def with_blocks(point: Point, window: int) -> Iterator[Point]:
    """The point with blocks of tokens that see each other: shorter than the window, longer, and all of the tokens."""
    for block in sorted({2, max(2, window // 2), window + 1, point.tokens}):
        if 1 < block <= point.tokens:
            yield dataclasses.replace(point, block=block)


def reach_of(mask: Node) -> int:
    """The farthest distance at which something can change, judging by the numbers that the mask's subgraph mentions.

    A distance may be compared with a number after it was multiplied or divided, so those factors count as well; not
    where quotients are compared with each other, which change at the edges of segments.
    """
    reach, factors = 16.0, 1.0
    for node in upstream(mask):
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


def whole_numbers(mask: Node) -> set[int]:
    """Sizes that the mask's subgraph mentions."""
    values = {value for node in upstream(mask) for value in _numbers(node)}
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
