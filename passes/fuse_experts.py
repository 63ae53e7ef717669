"""FuseExperts: the textbook mixture of experts becomes one `transom.experts`, which computes the chosen ones only.

Precondition: `Canonicalize` has run.
Rewrite: every expert's gates and ups of every token by one linear; what becomes of them, a gated activation or
`graphs.ops.CLAMPED_SWIGLU`; every expert's product with the matrix that leads back; and the sum over experts of the
results times their shares, which were scattered over zeros.
Skips: a sum that ends in another form, which is computed as it stands and reported.
"""

from __future__ import annotations

import operator
from typing import Any

from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call, layer_path, split_scalar
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_gated_mlp import activation_of

VIEWS = (aten.view.default, aten.reshape.default)


class FuseExperts(Pass):
    """Mixtures of experts as one operation."""

    after = (Canonicalize,)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Fuse every mixture."""
        changes, skipped = 0, list[str]()
        for scattered in graph.calls(aten.scatter.src):
            node = sum_of_shares(scattered)
            arguments = None if node is None else _match(graph, node, scattered)
            if node is None or arguments is None:
                skipped.append(
                    f"{layer_path(scattered) or scattered.name}: what reads the scattered shares is not known"
                )
                continue
            with graph.fx.inserting_before(node):
                node.replace_all_uses_with(graph.call(ops.EXPERTS, arguments, node))
            changes += 1
        return Rewrite(changes=changes, skipped=tuple(skipped))


def sum_of_shares(scattered: Node) -> Node | None:
    """The sum over the experts' axis of results times the scattered shares."""
    node = scattered
    for target in (aten.unsqueeze.default, aten.mul.Tensor, aten.sum.dim_IntList):
        users = list(node.users)
        if len(users) != 1 or not is_call(users[0], target):
            return None
        node = users[0]
    return node if list(node.args[1]) in ([2], [-2]) and len(node.args) == 2 and not node.kwargs else None


def _match(graph: Graph, node: Node, scattered: Node) -> tuple[Any, ...] | None:
    """Arguments of `ops.EXPERTS`."""
    zeros, axis, choices, weights = scattered.args
    E = scattered.meta["val"].shape[-1]
    if not is_call(zeros, aten.new_zeros.default, aten.zeros.default) or axis not in (-1, 2):
        return None
    product = node.args[0]
    shares = next(user for user in scattered.users)
    if shares not in product.args[:2] or shares.args[1] not in (-1, 3):
        return None
    out = next(value for value in product.args[:2] if value is not shares)
    # [B, T, E, D], laid out from [E, B * T, D].
    if not is_call(out, aten.permute.default) or list(out.args[1]) != [1, 2, 0, 3] or not is_call(out.args[0], *VIEWS):
        return None
    out, down_bias = out.args[0].args[0], None
    if is_call(out, aten.add.Tensor) and not out.kwargs:
        out, bias = out.args
        down_bias = rows_of_experts(graph, bias, 1)
        if down_bias is None or bias.meta["val"].shape[:2] != (E, 1):
            return None
    if not is_call(out, aten.matmul.default, aten.bmm.default):
        return None
    hidden, matrices = out.args
    if not is_call(matrices, aten.transpose.int) or {axis % 3 for axis in matrices.args[1:]} != {1, 2}:
        return None
    down = rows_of_experts(graph, matrices.args[0], 2)
    if down is None or matrices.args[0].meta["val"].shape[0] != E or not is_call(hidden, *VIEWS):
        return None
    hidden = hidden.args[0]
    if not is_call(hidden, aten.permute.default) or list(hidden.args[1]) != [2, 0, 1, 3]:
        return None
    gate = _gate(hidden.args[0])
    if gate is None:
        return None
    packed, activation = gate
    if not is_call(packed, *VIEWS) or packed.meta["val"].shape[2:] != (E, 2 * down.meta["val"].shape[1]):
        return None
    linear = packed.args[0]
    if not is_call(linear, aten.linear.default) or graph.weight_of(linear.args[1]) is None:
        return None
    x, gate_up, *bias = linear.args
    return x, choices, weights, gate_up, down, bias[0] if bias else None, down_bias, activation


def rows_of_experts(graph: Graph, node: Any, rank: int) -> Node | None:
    """The weight of this many axes that a view splits by experts."""
    if not is_call(node, *VIEWS) or graph.weight_of(node.args[0]) is None:
        return None
    weight: Node = node.args[0]
    return weight if weight.meta["val"].dim() == rank else None


def _gate(node: Any) -> tuple[Node, str] | None:
    """Gates and ups as one value, and what is computed of them."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for left, right in (node.args[:2], node.args[1::-1]):
        if (activation := activation_of(left)) is not None:
            packed = _halves(left.args[0], right)
        else:
            activation, packed = ops.CLAMPED_SWIGLU, _clamped(left, right)
        if packed is not None:
            return packed, activation
    return None


def _clamped(shifted: Any, activated: Any) -> Node | None:
    """Gates and ups of `(up + 1) * (gate * sigmoid(slope * gate))`, both clamped."""
    limit = ops.SWIGLU_LIMIT
    up = split_scalar(shifted, aten.add.Tensor)
    if up is None or up[1] != 1 or not is_call(activated, aten.mul.Tensor):
        return None
    gate, sigmoid = activated.args[:2]
    sloped = split_scalar(sigmoid.args[0], aten.mul.Tensor) if is_call(sigmoid, aten.sigmoid.default) else None
    if sloped != (gate, ops.SWIGLU_SLOPE) or not is_call(gate, aten.clamp.default):
        return None
    if not is_call(up[0], aten.clamp.default) or up[0].args[1:] != (-limit, limit) or gate.args[1:] != (None, limit):
        return None
    return _halves(gate.args[0], up[0].args[0])


def _halves(first: Any, second: Any) -> Node | None:
    """What two values are the first and the second half of, by its last axis."""
    if not (is_call(first, operator.getitem) and is_call(second, operator.getitem)):
        return None
    split = first.args[0]
    if split is not second.args[0] or (first.args[1], second.args[1]) != (0, 1):
        return None
    if not is_call(split, aten.split_with_sizes.default) or len(set(split.args[1])) != 1 or len(split.args[1]) != 2:
        return None
    packed: Node = split.args[0]
    return packed if split.args[2] % packed.meta["val"].dim() == packed.meta["val"].dim() - 1 else None
