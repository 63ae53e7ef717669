"""Which attentions read a cache, whether they are fused already or not."""

from __future__ import annotations

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.passes.left_softmaxes import PRODUCTS, is_softmax, multiplies_values, passes_on, path_to_product

_ATTENTIONS = (aten.scaled_dot_product_attention.default, ops.ATTENTION, ops.CACHED_ATTENTION)


def cache_readers(graph: Graph) -> dict[str, list[Node]]:
    """Attentions by the name of the cache that they read, as it came in or as it was written, in order of execution.

    An attention stands for itself where it is one operation, else for its softmax. A cache that is read twice by one
    attention, as keys and as values, has one reader.
    """
    softmaxes = {
        path[-1]: node for node in graph.calls_all() if is_softmax(node) and (path := path_to_product(graph, node))
    }
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    inputs = graph.inputs
    return {
        name: sorted(_readers(graph, inputs[name], softmaxes), key=order.__getitem__)
        for name, state in graph.states.items()
        if state.is_ring
    }


def _readers(graph: Graph, cache: Node, softmaxes: dict[Node, Node]) -> set[Node]:
    readers: set[Node] = set()
    queue, seen = [cache], {cache}
    for node in queue:
        for user in node.users:
            if is_call(user, *_ATTENTIONS):
                readers.add(user)
            elif is_call(user, *PRODUCTS) and multiplies_values(graph, user, node):
                readers.add(softmaxes.get(user) or _softmax_after(user) or user)
            elif user not in seen and (is_call(user, *PRODUCTS) or passes_on(node, user)):
                queue.append(user)
                seen.add(user)
    return readers


def _softmax_after(scores: Node) -> Node | None:
    queue, seen = [scores], {scores}
    for node in queue:
        for user in node.users:
            if is_softmax(user):
                return user
            if user not in seen and not is_call(user, *PRODUCTS) and passes_on(node, user):
                queue.append(user)
                seen.add(user)
    return None
