"""Faults planted in tiny models as they are traced, each with the verdict that it deserves: what each family adds."""

from __future__ import annotations

from tests.faults.graph import LINEAR, Edit, Spoil, argument
from tests.faults.llama import other_number
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass
from transom.zoo.rope import yarn_magnitude


def _angles_of(path: str) -> Edit:
    """Cosines and sines of another layer's rotation."""

    def edit(graph: Graph, node: Node) -> None:
        other = next(other for other in graph.calls(aten.cat.default) if layer_path(other) == path)
        # Of `low * cos - high * sin`, here and there.
        own, theirs = ([product.args[1] for product in turned.args[0][0].args] for turned in (node, other))
        tables = dict(zip(own, theirs, strict=True))
        for side in node.args[0]:
            for product in side.args[:2]:
                product.update_arg(1, tables[product.args[1]])

    return edit


def _unrotated(_: Graph, node: Node) -> None:
    """Heads as they were before their rotation."""
    split = node.args[0][0].args[0].args[0].args[0]
    node.replace_all_uses_with(split.args[0])


def _rms(graph: Graph, node: Node) -> None:
    """A norm that leaves the mean."""
    x, _, weight, _, eps, *_ = node.args
    with graph.fx.inserting_after(node):
        other = graph.call(ops.RMS_NORM, (x, weight, eps), node)
    node.replace_all_uses_with(other)


def _norm_of_keys(graph: Graph, node: Node) -> None:
    """The keys' weight for the queries'."""
    if node.args[1].meta["val"].dim() == 1:
        names = {name: placeholder for placeholder, name in graph.weight_names().items()}
        node.update_arg(1, graph.placeholders()[names["layers.1.self_attn.k_norm.weight"]])


def _whole(old: int, new: int) -> Edit:
    """Another whole number where a given one stands."""

    def edit(_: Graph, node: Node) -> None:
        if node.args[1] == old:
            node.update_arg(1, new)

    return edit


FAMILY_FAULTS: dict[str, tuple[str, Pass, int | None, str, str]] = {
    "a rotation that is scaled in a local layer": (
        "olmo3-tiny", Spoil(aten.cat.default, _angles_of("layers.3.self_attn"), "layers.1.self_attn"),
        1, "rope", "the local layer is rotated with the angles of global layers, whose RoPE base is the same",
    ),
    "a window of one key more": (
        "exaone4-tiny", Spoil(aten.lt.Scalar, argument(1, 17), "layers.1.self_attn"),
        1, "mask", "the window is off by one: 17 keys in place of 16",
    ),
    "a rotated layer without its rotation": (
        "smollm3-tiny", Spoil(aten.cat.default, _unrotated, "layers.2.self_attn"), 2, "rope", "there is no rotation",
    ),
    "a norm of rows with another epsilon": (
        "cohere2-tiny", Spoil(aten.layer_norm.default, argument(4, 1e-2), "layers.2.input_layernorm"),
        2, "norm", "the norm's epsilon is 0.01 in place of 1e-05",
    ),
    "a mean that stays": (
        "cohere2-tiny", Spoil(aten.layer_norm.default, _rms, "layers.1.input_layernorm"),
        1, "norm", "the norm does not subtract the mean, as RMSNorm does",
    ),
    "logits without their scale": (
        "cohere2-tiny", Spoil(aten.mul.Tensor, other_number(0.25, 1.0), ""),
        None, "logits", "the value is not multiplied by 0.25",
    ),
    "a bias": (
        "qwen2-tiny", Spoil(LINEAR, argument(2, None), "layers.1.self_attn.k_proj"),
        1, "projection", "the bias is left out",
    ),
    "queries that are normed as keys": (
        "qwen3-tiny", Spoil(aten.mul.Tensor, _norm_of_keys, "layers.1.self_attn.q_norm"),
        1, "norm", "the norm has the weight of layers.1.self_attn.k_norm",
    ),
    "no window": (
        "qwen3-tiny", Spoil(aten.lt.Scalar, argument(1, 400), "layers.1.self_attn"),
        1, "mask", "the window is ignored",
    ),
    "a window of one key less": (
        "mistral-tiny", Spoil(aten.lt.Scalar, argument(1, 15), "layers.2.self_attn"),
        2, "mask", "the window is off by one: 15 keys",
    ),
    "queries that grow faster": (
        "ministral3-tiny", Spoil(aten.mul.Tensor, other_number(0.1, 0.2), ""),
        0, "rope", "factor is 0.2 in place of 0.1",
    ),
    "a rotation without its magnitude": (
        "ministral3-tiny", Spoil(aten.mul.Tensor, other_number(yarn_magnitude(16.0), 1.0), ""),
        0, "rope", "multiplied by 0.782927",
    ),
    "experts with a sigmoid of another slope": (
        "gpt-oss-tiny", Spoil(aten.mul.Tensor, other_number(1.702, 1.0), "layers.1.mlp.experts"),
        1, "experts", "the value is not multiplied by 1.702",
    ),
    "a dilation of one more": (
        "longnet-tiny", Spoil(aten.remainder.Scalar, _whole(4, 5), "layers.1.self_attn"),
        1, "mask", "one key in 5 is seen in place of one in 4",
    ),
    "no dilation in a global layer": (
        "longnet-tiny", Spoil(aten.remainder.Scalar, _whole(3, 1), "layers.2.self_attn"),
        2, "mask", "the dilation is ignored: tokens see every key, not one in 3",
    ),
    "a segment of one less": (
        "longnet-tiny", Spoil(aten.floor_divide.default, _whole(16, 15), "layers.1.self_attn"),
        1, "mask", "segments are 15 long in place of 16",
    ),
}  # fmt: skip
"""The model, the fault, the layer and the operation that bisection names, and words of the cause."""
