"""Faults planted in llama3-tiny as it is traced, each with the verdict that it deserves."""

from __future__ import annotations

from tests.faults.graph import LINEAR, Edit, Spoil, int8, result, weight
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.passes.base import Pass


def other_number(old: float, new: float) -> Edit:
    """Another number where a given one stands."""

    def edit(_: Graph, node: Node) -> None:
        for index, value in enumerate(node.args):
            if isinstance(value, float) and abs(value - old) < 1e-9 + 1e-6 * abs(old):
                node.update_arg(index, new)

    return edit


def _gelu(graph: Graph, node: Node) -> None:
    with graph.fx.inserting_after(node):
        other = graph.call(aten.gelu.default, node.args, node)
    node.replace_all_uses_with(other)


def _other_norm(graph: Graph, node: Node) -> None:
    if node.args[1].meta["val"].dim() == 1:
        names = {name: placeholder for placeholder, name in graph.weight_names().items()}
        node.update_arg(1, graph.placeholders()[names["layers.2.input_layernorm.weight"]])


def _keys_for_values(graph: Graph, node: Node) -> None:
    names = {name: placeholder for placeholder, name in graph.weight_names().items()}
    node.update_arg(1, graph.placeholders()[names["layers.1.self_attn.k_proj.weight"]])


def _near(graph: Graph, node: Node) -> None:
    """Also hide what is 8 or more keys back."""
    hidden = node.args[1]
    keys, positions = graph.calls(aten.le.Tensor)[0].args
    with graph.fx.inserting_before(node):
        age = graph.call(aten.sub.Tensor, (positions, keys), node)
        far = graph.call(aten.ge.Scalar, (age, 8), node)
        both = graph.call(aten.bitwise_or.Tensor, (hidden, far), node)
    node.update_arg(1, both)


LLAMA_FAULTS: dict[str, tuple[Pass, int | None, str, str]] = {
    "another epsilon": (
        Spoil(aten.add.Tensor, other_number(1e-6, 1e-3), "layers.1.input_layernorm"),
        1, "norm", "the norm's epsilon is 0.001 in place of 1e-06",
    ),
    "another norm's weight": (
        Spoil(aten.mul.Tensor, _other_norm, "layers.0.post_attention_layernorm"),
        0, "norm", "the norm has the weight of layers.2.input_layernorm",
    ),
    "another base": (
        Spoil(aten.pow.Scalar, other_number(1e4, 5e5), ""), 0, "rope", "the RoPE base is 500000 in place of 10000",
    ),
    "a base that no list has": (
        Spoil(aten.pow.Scalar, other_number(1e4, 23_450.0), ""),
        0, "rope", "the RoPE base is 2.345e+04 in place of 1e+04",
    ),
    "an activation": (
        Spoil(aten.silu.default, _gelu, "layers.1.mlp"), 1, "activation", "the exact gelu in place of silu",
    ),
    "a window in a global layer": (
        Spoil(aten.masked_fill.Scalar, _near, "layers.2.self_attn"),
        2, "mask", "the global layer is bounded to a window of 8 keys",
    ),
    "scores without a scale": (
        Spoil(aten.mul.Tensor, other_number(32**-0.5, 1.0), "layers.0.self_attn"),
        0, "softmax", "the scores are not scaled",
    ),
    "the keys' weights for values": (
        Spoil(LINEAR, _keys_for_values, "layers.1.self_attn.v_proj"),
        1, "projection", "the weights are those of layers.1.self_attn.k_proj",
    ),
    "a quantised head": (
        Spoil(LINEAR, weight(int8), ""), None, "quantisation", "the head is rounded to 8 bits in blocks of 32",
    ),
    "a projection in bfloat16": (
        Spoil(LINEAR, weight(lambda rows: rows.bfloat16().float()), "layers.1.self_attn.k_proj"),
        1, "quantisation", "the weights are rounded to bfloat16",
    ),
    "a factor": (
        Spoil(LINEAR, result(aten.mul.Tensor, 1.5), "layers.2.mlp.down_proj"),
        2, "projection", "the output is multiplied by 1.5",
    ),
}  # fmt: skip
"""The fault in the graph as traced, the layer and the operation that bisection names, and words of the cause."""
