"""Faults in the graphs of models that see images, each with the place where it is first wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tests.faults.graph import LINEAR, Edit, Spoil, argument, option, result, weight
from transom.backends.artifact import DECODE, ENCODE_IMAGE
from transom.graphs.graph import Graph
from transom.graphs.match import aten, layer_path
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import Pass, Rewrite


class InEntry(Pass):
    """A pass that leaves all entries but one as they are."""

    def __init__(self, entry: str, fault: Pass) -> None:
        self.entry, self.fault = entry, fault

    def rewrite(self, graph: Graph) -> Rewrite:
        """Run it where it is meant to."""
        return self.fault.rewrite(graph) if graph.task == self.entry else Rewrite(changes=0)


class SeeUntil(Pass):
    """The attention of one layer sees as far as something else than `until` says."""

    def __init__(self, path: str, change: Callable[[Graph, Node, Node], Node]) -> None:
        self.path, self.change = path, change

    def rewrite(self, graph: Graph) -> Rewrite:
        """`change` gets the graph, `until` and the positions of the new tokens."""
        until = graph.inputs["until"]
        positions = next(node for node in graph.calls(aten.add.Tensor) if node.args[0] is graph.inputs["start"])
        readers = [user for user in until.users if layer_path(user) == self.path]
        assert readers, f"nothing reads until at {self.path}"
        with graph.fx.inserting_after(positions):
            other = self.change(graph, until, positions)
        for reader in readers:
            reader.replace_input_with(until, other)
        return Rewrite(changes=len(readers))


def _cut_behind(count: int) -> Callable[[Graph, Node, Node], Node]:
    """Tokens of an image before the `count`-th of a call see no further than that."""

    def change(graph: Graph, until: Node, positions: Node) -> Node:
        with graph.fx.inserting_before(positions.next):
            end = graph.call(aten.add.Tensor, (graph.inputs["start"], count - 1), positions)
            is_before = graph.call(aten.le.Tensor, (positions, end), positions)
            clipped = graph.call(aten.minimum.default, (until, end), positions)
            return graph.call(aten.where.self, (is_before, clipped, until), positions)

    return change


def _both_sides(graph: Graph, node: Node) -> None:
    """Distances behind a token count as those before it."""
    with graph.fx.inserting_before(node):
        node.update_arg(0, graph.call(aten.abs.default, (node.args[0],), node))


def _changed_soft(*call: Any) -> Edit:
    """Soft tokens go through one more call."""

    def edit(graph: Graph, node: Node) -> None:
        with graph.fx.inserting_before(node):
            node.update_arg(1, graph.call(call[0], (node.args[1], *call[1:]), node))

    return edit


def _without_table(graph: Graph, node: Node) -> None:
    """What is added is zeros."""
    with graph.fx.inserting_before(node):
        node.update_arg(1, graph.call(aten.mul.Tensor, (node.args[1], 0.0), node))


def _transposed_of(other: str) -> Edit:
    """The weights of another linear, transposed."""

    def edit(graph: Graph, node: Node) -> None:
        theirs = next(name for name in graph.weights if name.endswith(other))
        node.update_arg(1, graph.add_weight("spoilt", Weight.of(graph.weights[theirs].read().T.contiguous())))

    return edit


def _without_one(graph: Graph, node: Node) -> None:
    """1 + w becomes w."""
    if node.args[1] == 1:
        node.update_arg(1, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntryFault:
    """A fault in the graph of an entry, and the verdict that it deserves.

    Attributes:
        fault: Spoils the graph as traced.
        lowers: Whether ONNX Runtime's lowerings take what it leaves.
    """

    fault: Pass
    layer: int | None
    op: str
    cause: str
    entry: str = ENCODE_IMAGE
    lowers: bool = True


_LAYER = "vision_tower.encoder.layers"
_PROJECTOR = "multi_modal_projector"

ENTRY_FAULTS: Mapping[str, EntryFault] = {
    "images as text in a local layer": EntryFault(
        fault=SeeUntil("layers.1.self_attn", lambda graph, until, positions: positions),
        entry=DECODE, layer=1, op="mask", cause="the image block is missing: its tokens see only earlier ones",
    ),
    "images as text in a global layer": EntryFault(
        fault=SeeUntil("layers.2.self_attn", lambda graph, until, positions: positions),
        entry=DECODE, layer=2, op="mask", cause="the image block is missing: its tokens see only earlier ones",
    ),
    "a window on both sides": EntryFault(
        fault=Spoil(aten.lt.Scalar, _both_sides, "layers.0.self_attn"),
        entry=DECODE, layer=0, op="mask", lowers=False,
        cause="the window of 8 keys bounds how far ahead tokens of an image see, too",
    ),
    "an image cut in two": EntryFault(
        fault=SeeUntil("layers.0.self_attn", _cut_behind(10)),
        entry=DECODE, layer=0, op="mask", cause="images are cut in two, behind 6 and 8 tokens", lowers=False,
    ),
    "soft tokens with the embedding's factor": EntryFault(
        fault=Spoil(aten.where.self, _changed_soft(aten.mul.Tensor, 8.0), ""),
        entry=DECODE, layer=None, op="embedding", cause="soft tokens are multiplied by the embedding's factor 8",
    ),
    "soft tokens one position late": EntryFault(
        fault=Spoil(aten.where.self, _changed_soft(aten.roll.default, [1], [1]), ""),
        entry=DECODE, layer=None, op="embedding", cause="soft tokens stand one position too late", lowers=False,
    ),
    "transposed weights": EntryFault(
        fault=Spoil(LINEAR, weight(lambda rows: rows.T), f"{_LAYER}.0.self_attn.q_proj"),
        layer=0, op="projection", cause="the weights are transposed",
    ),
    "fc1 and fc2 swapped": EntryFault(
        fault=Spoil(LINEAR, _transposed_of("layers.0.mlp.fc2.weight"), f"{_LAYER}.0.mlp.fc1"),
        layer=0, op="activation", cause="layers.0.mlp.fc2, transposed",
    ),
    "rows in another order": EntryFault(
        fault=Spoil(LINEAR, weight(lambda rows: rows.roll(5, 0)), f"{_LAYER}.1.self_attn.out_proj"),
        layer=1, op="projection", cause="rows of the weights stand in another order: row 0 is row 43 of the checkpoint",
    ),
    "rounded weights": EntryFault(
        fault=Spoil(LINEAR, weight(lambda rows: rows.bfloat16().float()), f"{_LAYER}.1.mlp.fc2"),
        layer=1, op="quantisation", cause="the weights are rounded to bfloat16",
    ),
    "another epsilon": EntryFault(
        fault=Spoil(aten.layer_norm.default, argument(4, 1e-2), f"{_LAYER}.0.layer_norm2"),
        layer=0, op="norm", cause="the norm's epsilon is 0.01 in place of 1e-06",
    ),
    "another activation": EntryFault(
        fault=Spoil(aten.gelu.default, option(approximate="none"), f"{_LAYER}.1.mlp"),
        layer=1, op="activation", cause="the activation is the exact gelu in place of gelu in its tanh form",
    ),
    "scores without a scale": EntryFault(
        fault=Spoil(aten.mul.Tensor, argument(1, 1.0), f"{_LAYER}.1.self_attn"),
        layer=1, op="softmax", cause="the scores are not scaled",
    ),
    "no vectors of positions": EntryFault(
        fault=Spoil(aten.add.Tensor, _without_table, "vision_tower.embeddings"),
        layer=None, op="embedding", cause="positions have no vectors of their own",
    ),
    "averages transposed": EntryFault(
        fault=Spoil(aten.mean.dim, result(aten.transpose.int, 1, 2), _PROJECTOR),
        layer=None, op="average", cause="rows and columns of the averages are swapped",
    ),
    "averages of other axes": EntryFault(
        fault=Spoil(aten.mean.dim, argument(1, [1, 3]), _PROJECTOR),
        layer=None, op="average", cause="averages are taken over axes (1, 3) of (1, 4, 4, 4, 4, 48) in place of (2, 4)",
    ),
    "a soft norm without its one": EntryFault(
        fault=Spoil(aten.add.Tensor, _without_one, f"{_PROJECTOR}.mm_soft_emb_norm"),
        layer=None, op="norm", cause="the norm multiplies by w in place of 1 + w",
    ),
}  # fmt: skip
"""Faults planted in the graphs of gemma3-vision-tiny."""
