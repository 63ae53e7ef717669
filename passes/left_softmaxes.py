"""Softmaxes that stand before a product of weights and values: attention that no pattern took.

Whatever stands between the two is walked through: casts, dropout, products with a mask, concatenated sinks that are cut
off again. A softmax that reaches no such product, as a router's or a sampler's, is no attention. Nor is one whose
product is with a parameter: values come from the text.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch

from transom.graphs.graph import Graph
from transom.graphs.match import CASTS, LAYOUT, aten, is_call
from transom.graphs.node import Node

PRODUCTS = (
    aten.matmul.default, aten.bmm.default, aten.mm.default, aten.linear.default, aten.baddbmm.default,
    aten.addmm.default, aten.einsum.default,
)  # fmt: skip

_SOFTMAXES = (
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int,
    aten._log_softmax.default,
)  # fmt: skip

_REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "logsumexp", "topk"})


def left_softmaxes(graph: Graph, known: Container[Node]) -> Iterator[tuple[Node, str]]:
    """Every softmax whose result is an operand of a product with values, with the operations in between, in words.

    Args:
        graph: What to look at.
        known: Products that were reported already; a softmax that reaches one of them is left out.
    """
    for node in graph.calls_all():
        if is_softmax(node) and (path := path_to_product(graph, node, known)):
            *between, product = (_name(step) for step in path)
            yield node, f"attention by {', '.join(between)} and {product} is not recognised"


def is_softmax(node: Node) -> bool:
    """Whether a node is a softmax, or the part of one by hand that every weight comes from."""
    if is_call(node, *_SOFTMAXES):
        return True
    if is_call(node, aten.exp.default, aten.exp2.default):  # exp(x) / exp(x).sum()
        readers = [
            user for direct in node.users for user in (direct, *(direct.users if is_call(direct, *CASTS) else ()))
        ]
        return any(_name(reader) == "sum" for reader in readers)
    if is_call(node, aten.sub.Tensor):  # x - x.logsumexp()
        return is_call(node.args[1], aten.logsumexp.default)
    return False


def path_to_product(graph: Graph, softmax: Node, known: Container[Node] = ()) -> list[Node] | None:
    """The nodes from a softmax to the nearest product with values, both included; None if it reaches none."""
    before: dict[Node, Node | None] = {softmax: None}
    queue = [softmax]
    for node in queue:
        for user in node.users:
            if user in before:
                continue
            if is_call(user, *PRODUCTS):
                if user in known:
                    return None
                if multiplies_values(graph, user, node):
                    return [*_walk(before, node), user]
            elif passes_on(node, user):
                before[user] = node
                queue.append(user)
    return None


def _walk(before: dict[Node, Node | None], last: Node) -> list[Node]:
    path: list[Node] = []
    step: Node | None = last
    while step is not None:
        path.append(step)
        step = before[step]
    return path[::-1]


def multiplies_values(graph: Graph, product: Node, weights: Node) -> bool:
    """Whether the other operand of a product is computed from the text, and is no parameter."""
    others = [_skip_layout(side) for side in product.all_input_nodes if side is not weights]
    return not others or any(graph.weight_of(other) is None for other in others)


def _skip_layout(value: Any) -> Any:
    while is_call(value, *CASTS, *LAYOUT):
        value = value.args[0]
    return value


def passes_on(weights: Node, user: Node) -> bool:
    """Whether the result of an operation still is weights: it has numbers for each key, and not another softmax's."""
    value = user.meta.get("val")
    if user.op != "call_function" or is_softmax(user) or _name(user) in _REDUCTIONS:
        return False
    if isinstance(value, (list, tuple)):
        return all(isinstance(part, torch.Tensor) for part in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    given = weights.meta["val"]
    if is_call(user, *LAYOUT) or not isinstance(given, torch.Tensor) or torch.Tag.pointwise not in user.target.tags:
        return True
    # One that is spread over other axes scales something else, such as an expert's output.
    sizes = zip(reversed(given.shape), reversed(value.shape), strict=False)
    return not any(str(old) == "1" and str(new) != "1" for old, new in sizes)


def _name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).lstrip("_")
