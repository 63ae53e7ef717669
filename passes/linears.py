"""Linears that read a weight or its codes, and several of them as one."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from transom.graphs import ops
from transom.graphs.encoded import Encoded
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.graphs.weight import Weight

CodeNodes = tuple[Node, Node, Node | None, str]
"""Codes, scales, zero points or offsets, and number, as the quantised operations of `graphs.ops` take them."""

_CODES = ".codes"


def add_codes(graph: Graph, name: str, encoded: Encoded, origin: str) -> CodeNodes:
    """Add an encoded matrix: weights NAME.codes, NAME.scales and, if it has them, NAME.zero_points or NAME.offsets."""
    codes, scales, zeros = Weight.parts_of(encoded, origin)
    return (
        graph.add_weight(name + _CODES, codes),
        graph.add_weight(f"{name}.scales", scales),
        None if zeros is None else graph.add_weight(f"{name}.{encoded.zeros_name}", zeros),
        encoded.format,
    )


def matrix_of(graph: Graph, node: Node) -> tuple[str, Weight] | None:
    """Name of the matrix of a linear without a bias, and its weight, or its codes; None for anything else."""
    if is_call(node, ops.LINEAR_QUANTIZED):
        named_codes = graph.weight_of(node.args[1])
        return named_codes and (named_codes[0].removesuffix(_CODES), named_codes[1])
    if is_call(node, aten.linear.default) and (len(node.args) == 2 or node.args[2] is None):
        return graph.weight_of(node.args[1])
    return None


def stack(graph: Graph, linears: Sequence[Node], name: str) -> Node | None:
    """One linear for several that `matrix_of` knows, of one input and one operation, before the first of them.

    Returns:
        The linear; None if their matrices are codes that no format holds together.
    """
    first, weights = linears[0], [named[1] for node in linears if (named := matrix_of(graph, node))]
    with graph.fx.inserting_before(first):
        if first.target is aten.linear.default:
            return graph.call(first.target, (first.args[0], graph.add_weight(name, Weight.concat(weights))), first)
        parts = [weight.part_of for weight in weights if weight.part_of is not None]
        encoded = Encoded.stack(parts) if len(parts) == len(linears) else None
        if encoded is None:
            return None
        origin = " + ".join(weight.origin for weight in weights)
        return graph.call(first.target, (first.args[0], *add_codes(graph, name, encoded, origin)), first)


def split(graph: Graph, linear: Node, linears: Sequence[Node]) -> None:
    """Let the readers of several linears read their shares of the one that they were stacked into."""
    sizes = [int(node.meta["val"].shape[-1]) for node in linears]
    with graph.fx.inserting_before(linears[0]):
        whole = graph.call(aten.split_with_sizes.default, (linear, sizes, -1), linears[0])
        pieces = [graph.call(operator.getitem, (whole, index), node) for index, node in enumerate(linears)]
    for node, piece in zip(linears, pieces, strict=True):
        node.replace_all_uses_with(piece)
