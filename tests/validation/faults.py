"""Faults planted in the graphs of gemma3-tiny, each with the verdict that it deserves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.artifacts import CHUNK
from tests.conftest import WINDOW
from transom.formats.schemes import SPECS, scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_norms import FuseNorms
from transom.passes.fuse_rotary import FuseRotary
from transom.passes.pipelines import pipeline
from transom.validation.bisection.context import rounded

Edit = Callable[[Graph, Node], None]
LINEAR = aten.linear.default
SCALE = 40**-0.5
"""Softmax scale of gemma3-tiny."""


class Spoil(Pass):
    """Edits the calls of one operation whose module path is among some."""

    def __init__(self, target: object, edit: Edit, *paths: str) -> None:
        self.target, self.edit, self.paths = target, edit, paths

    def rewrite(self, graph: Graph) -> Rewrite:
        """Edit every call that is meant."""
        nodes = [node for node in graph.calls(self.target) if layer_path(node) in self.paths]
        assert nodes, f"there is nothing to spoil at {self.paths}"
        for node in nodes:
            self.edit(graph, node)
        return Rewrite(changes=len(nodes))


def argument(index: int, value: Any) -> Edit:
    """Another argument."""
    return lambda _, node: node.update_arg(index, value)


def option(**values: Any) -> Edit:
    """Other keyword arguments."""

    def edit(_: Graph, node: Node) -> None:
        for name, value in values.items():
            node.update_kwarg(name, value)

    return edit


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Other weights for a linear."""

    def edit(graph: Graph, node: Node) -> None:
        held = graph.weight_of(node.args[1])
        assert held is not None
        spoilt = dataclasses.replace(held[1], read_rows=lambda start, stop: change(held[1].read())[start:stop])
        node.update_arg(1, graph.add_weight(f"{held[0]}.spoilt", spoilt))

    return edit


def result(*call: Any) -> Edit:
    """The result goes through one more call."""

    def edit(graph: Graph, node: Node) -> None:
        with graph.fx.inserting_after(node):
            changed = graph.call(call[0], (node, *call[1:]), node)
        node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)

    return edit


def _int8(rows: torch.Tensor) -> torch.Tensor:
    return rounded(rows, SPECS["int8_block32"])


def _one_weight(rows: torch.Tensor) -> torch.Tensor:
    changed = rows.clone()
    changed[7, 3] += 0.5
    return changed


def _first_weights(graph: Graph, node: Node) -> None:
    node.update_arg(1, graph.calls(LINEAR)[0].args[1])


def _bare_weight(graph: Graph, node: Node) -> None:
    held = graph.weight_of(node.args[1])
    assert held is not None
    node.update_arg(1, graph.add_weight(f"{held[0]}.bare", held[1].map_rows(lambda rows: rows - 1)))


class SwapAngles(Pass):
    """Layers of one kind rotate by the angles of the other kind."""

    after = (FuseRotary,)

    def __init__(self, layers: tuple[int, ...], other: int) -> None:
        self.layers, self.other = layers, other

    def rewrite(self, graph: Graph) -> Rewrite:
        """Queries and keys of every layer are rotated, in this order."""
        rotations = graph.calls(ops.ROTARY)
        for layer in self.layers:
            for node in rotations[2 * layer : 2 * layer + 2]:
                node.args = (node.args[0], *rotations[2 * self.other].args[1:3], node.args[3])
        return Rewrite(changes=len(self.layers))


class LateAngles(Pass):
    """Local layers rotate by positions that are one too large."""

    after = (FuseRotary,)

    def rewrite(self, graph: Graph) -> Rewrite:
        """Add one to the positions that the first table of angles is made of."""
        positions = next(node for node in graph.calls(aten.add.Tensor) if node.args[0] is graph.inputs["start"])
        angles = next(user for user in positions.users if user.target is aten.unsqueeze.default)
        with graph.fx.inserting_after(positions):
            late = graph.call(aten.add.Tensor, (positions, 1), positions)
        angles.update_arg(0, late)
        return Rewrite(changes=1)


class BoundEveryCache(BoundLocalCaches):
    """Global layers' caches get the slots of local ones; their masks stay."""

    def _readers_of(self, cache: Node) -> Any:
        readers = super()._readers_of(cache) or []
        return [dataclasses.replace(reader, window=WINDOW, slots=WINDOW + self.chunk - 1) for reader in readers]

    def ensures(self, graph: Graph) -> None:
        """It promises nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault in the pipeline of a target.

    Attributes:
        plant: Makes the passes that are put behind `behind`, or that take its place.
        behind: A pass of the target.
        replaces: Whether they take its place.
        layer: Where the first wrong number is.
        op: What computes it.
        cause: Words that the cause must hold.
        target: The target.
    """

    plant: Callable[[], list[Pass]]
    behind: type[Pass]
    replaces: bool = False
    layer: int | None
    op: str
    cause: str
    target: str = "onnx"

    def passes(self) -> list[Pass]:
        """The target's passes with the fault among them."""
        found: list[Pass] = []
        for current in pipeline(self.target, chunk=CHUNK, scheme=scheme("none")).passes:
            here = isinstance(current, self.behind)
            found += [*([] if here and self.replaces else [current]), *(self.plant() if here else [])]
        return found


def _spoil(target: Any, edit: Edit, *paths: str) -> Callable[[], list[Pass]]:
    return lambda: [Spoil(target, edit, *paths)]


FAULTS: Mapping[str, Fault] = {
    "a window that is one too long": Fault(
        plant=_spoil(ops.ATTENTION, option(window=WINDOW + 1), "layers.1.self_attn"),
        behind=FuseAttention, layer=1, op="mask", cause="the window is off by one: 17 keys in place of 16",
    ),
    "a window that is one too short": Fault(
        plant=_spoil(ops.ATTENTION, option(window=WINDOW - 1), "layers.1.self_attn"),
        behind=FuseAttention, layer=1, op="mask", cause="the window is off by one: 15 keys in place of 16",
    ),
    "a window that is ignored": Fault(
        plant=_spoil(ops.ATTENTION, option(window=0), "layers.1.self_attn"),
        behind=FuseAttention, layer=1, op="mask",
        cause="the window is ignored: the local layer sees every earlier key",
    ),
    "a window that is ignored over a bounded cache": Fault(
        plant=_spoil(ops.ATTENTION, option(window=0), "layers.1.self_attn"),
        behind=BoundLocalCaches, layer=1, op="mask",
        cause="the local layer sees every earlier key, as far as its cache holds them",
    ),
    "a window on a global layer": Fault(
        plant=_spoil(ops.ATTENTION, option(window=WINDOW), "layers.2.self_attn"),
        behind=FuseAttention, layer=2, op="mask", cause="the global layer is bounded to the window of 16 keys",
    ),
    "global angles in local layers": Fault(
        plant=lambda: [SwapAngles((0, 1, 3, 4), 2)], behind=FuseRotary, layer=0, op="rope",
        cause="the local layer is rotated with the RoPE base of global layers: theta 1e+06 and factor 8",
    ),
    "local angles in global layers": Fault(
        plant=lambda: [SwapAngles((2, 5), 0)], behind=FuseRotary, layer=2, op="rope",
        cause="the global layer is rotated with the RoPE base of local layers: theta 10000",
    ),
    "a cache of a window's slots": Fault(
        plant=lambda: [BoundLocalCaches(1)], behind=BoundLocalCaches, replaces=True, layer=0, op="cache write",
        cause="the local layer's cache has 16 slots, 52 are needed for a window of 16 and chunks of 37",
    ),
    "a norm without its one": Fault(
        plant=_spoil(ops.RMS_NORM, _bare_weight, "layers.1.post_attention_layernorm"),
        behind=FuseNorms, layer=1, op="norm", cause="multiplies by w in place of 1 + w",
    ),
    "scores without a scale": Fault(
        plant=_spoil(ops.ATTENTION, option(scale=1.0), "layers.2.self_attn"),
        behind=FuseAttention, layer=2, op="softmax", cause="the scores are not scaled",
    ),
    "a window in a late layer only": Fault(
        plant=_spoil(ops.ATTENTION, option(window=WINDOW + 1), "layers.4.self_attn"),
        behind=FuseAttention, layer=4, op="mask", cause="off by one: 17 keys in place of 16",
    ),
    "the first of two": Fault(
        plant=lambda: [
            Spoil(ops.ATTENTION, option(window=0), "layers.4.self_attn"),
            Spoil(ops.ATTENTION, option(scale=2 * SCALE), "layers.3.self_attn"),
        ],
        behind=FuseAttention, layer=3, op="softmax", cause="the softmax scale is 0.3162 in place of 0.1581",
    ),
    "a global cache of a local one's slots": Fault(
        plant=lambda: [BoundEveryCache(CHUNK)], behind=BoundLocalCaches, replaces=True,
        layer=2, op="cache write", cause="the global layer's cache has 52 slots, it must grow with the context",
    ),
    "one slot too few": Fault(
        plant=lambda: [BoundLocalCaches(CHUNK - 1)], behind=BoundLocalCaches, replaces=True,
        layer=0, op="cache write", cause="the local layer's cache has 51 slots, 52 are needed",
    ),
    "a quantised projection": Fault(
        plant=_spoil(LINEAR, weight(_int8), "layers.2.mlp.down_proj"),
        behind=FuseAttention, layer=2, op="quantisation", cause="the weights are rounded to 8 bits in blocks of 32",
    ),
    "a quantised gate": Fault(
        plant=_spoil(LINEAR, weight(_int8), "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"),
        behind=FuseAttention, layer=1, op="quantisation", cause="the weights are rounded to 8 bits in blocks of 32",
    ),
    "a perturbed projection": Fault(
        plant=_spoil(LINEAR, weight(_one_weight), "layers.3.self_attn.o_proj"),
        behind=FuseAttention, layer=3, op="projection", cause="1 of 64 output rows differ (first 7)",
    ),
    "another layer's weights": Fault(
        plant=_spoil(LINEAR, _first_weights, "layers.4.self_attn.q_proj"),
        behind=FuseAttention, layer=4, op="projection", cause="the weights are those of layers.0.self_attn.q_proj",
    ),
    "positions one too large": Fault(
        plant=lambda: [LateAngles()],
        behind=FuseRotary, layer=0, op="rope", cause="RoPE's positions are one too large",
    ),
    "another epsilon": Fault(
        plant=_spoil(ops.RMS_NORM, argument(2, 1e-2), "layers.3.pre_feedforward_layernorm"),
        behind=FuseNorms, layer=3, op="norm", cause="epsilon is 0.01 in place of 1e-06",
    ),
    "a residual that is lost": Fault(
        plant=_spoil(aten.add.Tensor, lambda _, node: node.replace_all_uses_with(node.args[1]), "layers.5"),
        behind=FuseNorms, layer=5, op="residual", cause="the stream is lost: only the branch comes out",
    ),
    "a factor": Fault(
        plant=_spoil(LINEAR, result(aten.mul.Tensor, 1.5), "layers.1.self_attn.v_proj"),
        behind=FuseAttention, layer=1, op="projection", cause="the output is multiplied by 1.5",
    ),
    "something never seen before": Fault(
        plant=_spoil(LINEAR, result(aten.sin.default), "layers.2.mlp.down_proj"),
        behind=FuseAttention, layer=2, op="projection", cause="known causes reproduces the difference",
    ),
    "unscaled embedding": Fault(
        plant=_spoil(aten.mul.Tensor, argument(1, 1.0), ""),
        behind=FuseAttention, layer=None, op="embedding", cause="the embedding is not multiplied by 8",
    ),
    "capped logits": Fault(
        plant=_spoil(aten.index_select.default, lambda g, n: _cap(g, n), ""),
        behind=FuseAttention, layer=None, op="logits", cause="the logits are capped at 30",
    ),
    "a window where keys are attended before they are written": Fault(
        plant=_spoil(ops.ATTENTION, option(window=WINDOW - 1), "layers.3.self_attn"),
        behind=FuseAttention, layer=3, op="mask", cause="off by one: 15 keys in place of 16", target="xla",
    ),
}  # fmt: skip


def _cap(graph: Graph, node: Node) -> None:
    for call in ((aten.div.Tensor, 30.0), (aten.tanh.default,), (aten.mul.Tensor, 30.0)):
        result(*call)(graph, node)
        node = next(user for user in node.users if user.target is call[0])
