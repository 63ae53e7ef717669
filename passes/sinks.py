"""Sinks as models write them: one more score of every query head, which takes part in the softmax and has no value.

They are either a last column of the masked scores, cut off again behind the softmax, or a factor
`sigmoid(logsumexp(masked scores) - sink)` on the result, which is the same: the softmax's denominator, less the sink,
over the whole of it.
"""

from __future__ import annotations

import operator
from typing import Any

from transom.graphs.match import CASTS, arguments, aten, is_call, skip_casts
from transom.graphs.node import Node, is_node


def without_maximum(scores: Any) -> Any:
    """Scores from which the largest of each row was taken away, which changes no softmax."""
    if not is_call(scores, aten.sub.Tensor) or scores.kwargs:
        return scores
    given, largest = scores.args
    if is_call(largest, operator.getitem) and largest.args[1] == 0 and is_call(largest.args[0], aten.max.dim):
        reduced, axis, *keep = largest.args[0].args
    elif is_call(largest, aten.amax.default) and len(largest.args) > 1 and len(largest.args[1]) == 1:
        reduced, (axis,), *keep = largest.args
    else:
        return scores
    return given if reduced is given and axis in (-1, 3) and keep == [True] else scores


def split_sinks(joined: Any, kept: Any) -> tuple[Any, Node] | None:
    """Masked scores and sinks [N], joined along the keys, of which `kept` has the scores' part of the weights."""
    if not is_call(joined, aten.cat.default) or len(joined.args[0]) != 2 or joined.args[1:] not in ((-1,), (3,)):
        return None
    masked, column = joined.args[0]
    if not is_call(kept, aten.slice.Tensor) or joined.meta["val"].dim() != 4:
        return None
    cut = arguments(kept)
    keeps_scores = cut["dim"] in (-1, 3) and cut["start"] in (0, None) and cut["step"] == 1
    sinks = _per_head(column, (joined.meta["val"].shape[1], 1, 1))
    if sinks is None or not keeps_scores or _sizes(kept) != _sizes(masked):
        return None
    return skip_casts(masked), sinks


def split_rescaling(product: Node, masked: Node) -> tuple[Node, Node] | None:
    """What multiplies attention's result by `sigmoid(logsumexp(masked scores) - sinks)`, and the sinks [N]."""
    user: Any = next(iter(product.users), None)
    if len(product.users) != 1 or not is_call(user, aten.mul.Tensor) or user.args[0] is user.args[1]:
        return None
    factor = skip_casts(next(side for side in user.args[:2] if side is not product))
    heads = int(product.meta["val"].shape[1])
    column: tuple[int, ...] = (heads, 1, 1)
    if is_call(factor, aten.unsqueeze.default) and factor.args[1] in (-1, 3):
        factor, column = skip_casts(factor.args[0]), (heads, 1)
    if not is_call(factor, aten.sigmoid.default):
        return None
    difference = skip_casts(factor.args[0])
    if not is_call(difference, aten.sub.Tensor) or difference.kwargs:
        return None
    total, sinks = skip_casts(difference.args[0]), _per_head(difference.args[1], column)
    if not is_call(total, aten.logsumexp.default) or [*total.args[1]] not in ([-1], [3]) or sinks is None:
        return None
    keeps_axis = len(total.args) > 2 and total.args[2] is True
    if skip_casts(total.args[0]) is not masked or keeps_axis != (len(column) == 3):
        return None
    return (user, sinks) if user.meta["val"].dtype == product.meta["val"].dtype else None


def _per_head(value: Any, trailing: tuple[int, ...]) -> Node | None:
    """The vector [N] that a value repeats over all other axes, if its sizes, less leading ones, are `trailing`."""
    value = skip_casts(value)
    while is_call(value, aten.expand.default):
        value = skip_casts(value.args[0])
    if not is_node(value) or [size for size in _sizes(value) if size != "1"] not in ([], [str(trailing[0])]):
        return None
    if _sizes(value)[-len(trailing) :] != [str(size) for size in trailing]:
        return None
    while is_call(value, *CASTS, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.slice.Tensor):
        source = value.args[0]
        if is_call(value, aten.slice.Tensor) and _sizes(value) != _sizes(source):
            return None
        value = source
    return value if _sizes(value) == [str(trailing[0])] else None


def _sizes(value: Node) -> list[str]:
    """As text: comparing a symbol with a number would guess, and keep the guess as a fact."""
    return [str(size) for size in value.meta["val"].shape]
