"""Faults planted in Gemma 4 as it is traced, each with the verdict that it deserves."""

from __future__ import annotations

import operator

from tests.faults.graph import Spoil
from tests.faults.llama import other_number
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass


def _read_layer_0(graph: Graph, node: Node) -> None:
    """Keys or values that the first layer wrote, in place of the second's."""
    names = {written: name for name, written in graph.outputs.items()}
    node.update_arg(0, graph.outputs[names[node.args[0]].replace("cache.1.", "cache.0.")])


def _are_values(node: Node) -> bool:
    """Whether what is written to a cache was not rotated."""
    return is_call(node.args[3], aten.transpose.int)


def _bare_values(graph: Graph, node: Node) -> None:
    if _are_values(node):
        projected = next(
            view for view in graph.calls(aten.view.default) if layer_path(view.args[0]) == f"{layer_path(node)}.v_proj"
        )
        with graph.fx.inserting_before(node):
            bare = graph.call(aten.transpose.int, (projected, 1, 2), node)
        node.update_arg(3, bare)


def _rotated_values(graph: Graph, node: Node) -> None:
    if _are_values(node):
        cos, sin = (graph.calls(operation)[0] for operation in (aten.cos.default, aten.sin.default))
        with graph.fx.inserting_before(node):
            rotated = graph.call(ops.ROTARY, (node.args[3], cos, sin, True), node)
        node.update_arg(3, rotated)


def _first_embedding(graph: Graph, node: Node) -> None:
    """Where a gate meets the layer's own embedding."""
    pieces = [side for side in node.args if is_call(side, operator.getitem)]
    if pieces:
        split = pieces[0].args[0]
        first = next(user for user in split.users if user.args[1] == 0)
        node.update_arg(1, first)


def _no_scalar(graph: Graph, node: Node) -> None:
    named = graph.weight_of(node.args[1])
    if named is not None and named[0].endswith("layer_scalar"):
        node.replace_all_uses_with(node.args[0])


def _no_factor(graph: Graph, node: Node) -> None:
    """Experts' shares as the softmax gives them."""
    factors = [side for side in node.args if is_call(side, aten.index.Tensor)]
    if factors:
        node.replace_all_uses_with(next(side for side in node.args if side not in factors))


GEMMA4_FAULTS: dict[str, tuple[str, Pass, int | None, str, str]] = {
    "keys and values of another layer": (
        "gemma4-tiny", Spoil(aten.repeat_interleave.self_int, _read_layer_0, "layers.3.self_attn"),
        3, "softmax", "it reads the keys and values of layer 0",
    ),
    "values that are not normed": (
        "gemma4-tiny", Spoil(aten.index_copy.default, _bare_values, "layers.1.self_attn"),
        1, "softmax", "layers.1.self_attn.v_norm is passed over",
    ),
    "values that are rotated": (
        "gemma4-tiny", Spoil(aten.index_copy.default, _rotated_values, "layers.1.self_attn"),
        1, "softmax", "the values are rotated, as the keys are",
    ),
    "the embedding of another layer": (
        "gemma4-tiny", Spoil(aten.mul.Tensor, _first_embedding, "layers.2"),
        2, "activation", "it is given piece 0 of 6 in place of piece 2",
    ),
    "a layer without its factor": (
        "gemma4-tiny", Spoil(aten.mul.Tensor, _no_scalar, "layers.1"),
        2, "residual", "the factor layers.1.layer_scalar is left out",
    ),
    "experts without their factors": (
        "gemma4-experts-tiny", Spoil(aten.mul.Tensor, _no_factor, "layers.1.router"),
        1, "experts", "the factor layers.1.router.per_expert_scale is left out",
    ),
    "a router of states that are not scaled": (
        "gemma4-experts-tiny", Spoil(aten.mul.Tensor, other_number(0.125, 1.0), "layers.2.router"),
        2, "projection", "the value is not multiplied by 0.125",
    ),
}  # fmt: skip
"""The model, the fault as it is traced, the layer and the operation that bisection names, and words of the cause."""
