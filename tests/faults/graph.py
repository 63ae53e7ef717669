"""Faults planted in graphs of a Gemma, each with the verdict that it deserves.

They stand in gemma3-tiny, and those that the conformance suite must notice also in the suite's models: both begin with
two local layers and a global one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from transom.formats.schemes import SPECS
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, layer_path
from transom.graphs.node import Node
from transom.passes.base import Pass, Rewrite
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_norms import FuseNorms
from transom.passes.fuse_rotary import FuseRotary
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
        named = graph.weight_of(node.args[1])
        assert named is not None
        name, plain = named
        spoilt = dataclasses.replace(plain, read_rows=lambda start, stop: change(plain.read())[start:stop])
        node.update_arg(1, graph.add_weight(f"{name}.spoilt", spoilt))

    return edit


def result(*call: Any) -> Edit:
    """The result goes through one more call."""

    def edit(graph: Graph, node: Node) -> None:
        with graph.fx.inserting_after(node):
            changed = graph.call(call[0], (node, *call[1:]), node)
        node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)

    return edit


def int8(rows: torch.Tensor) -> torch.Tensor:
    return rounded(rows, SPECS["int8_block32"])


def _one_weight(rows: torch.Tensor) -> torch.Tensor:
    changed = rows.clone()
    changed[7, 3] += 0.5
    return changed


def _first_weights(graph: Graph, node: Node) -> None:
    node.update_arg(1, graph.calls(LINEAR)[0].args[1])


def _bare_weight(graph: Graph, node: Node) -> None:
    named = graph.weight_of(node.args[1])
    assert named is not None
    name, plain = named
    node.update_arg(1, graph.add_weight(f"{name}.bare", plain.map_rows(lambda rows: rows - 1)))


class SwapAngles(Pass):
    """Layers of one kind rotate by the angles of the other kind: local ones by those of layer 2, or global ones by
    those of layer 0.
    """

    after = (FuseRotary,)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def rewrite(self, graph: Graph) -> Rewrite:
        """Queries and keys of every layer are rotated, in this order."""
        rotations = graph.calls(ops.ROTARY)
        cos, sin = rotations[4 if self.kind == "local" else 0].args[1:3]
        # From the third layer on there is a global one in every three.
        nodes = [node for at, node in enumerate(rotations) if (at // 2 % 3 == 2) == (self.kind == "global")]
        for node in nodes:
            node.args = (node.args[0], cos, sin, node.args[3])
        return Rewrite(changes=len(nodes))


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

    def __init__(self, chunk: int, window: int) -> None:
        super().__init__(chunk)
        self.window = window

    def _readers_of(self, cache: Node, slack: int) -> Any:
        readers, slots = super()._readers_of(cache, slack) or [], self.window + slack
        return [dataclasses.replace(reader, window=self.window, slots=slots) for reader in readers]

    def ensures(self, graph: Graph) -> None:
        """It promises nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFault:
    """A fault in the passes of a target.

    Attributes:
        plant: Makes the passes that are put behind `behind`, or that take its place, from the window and the chunk.
        behind: A pass of the target.
        replaces: Whether they take its place.
        layer: Where bisection finds the first wrong number.
        op: What computes it; None: no number is wrong.
        cause: Words that the cause must hold, on gemma3-tiny.
        suite: Kinds of what the conformance suite finds; empty: too quiet for it to be heard over rounding.
        target: The target.
    """

    plant: Callable[[int, int], list[Pass]]
    behind: type[Pass]
    replaces: bool = False
    layer: int | None
    op: str | None
    cause: str = ""
    suite: frozenset[str] = frozenset()
    target: str = "onnx"

    def passes(self, passes: Sequence[Pass], *, window: int, chunk: int) -> list[Pass]:
        """A target's passes with the fault among them."""
        spoilt: list[Pass] = []
        for current in passes:
            here = isinstance(current, self.behind)
            spoilt += [*([] if here and self.replaces else [current]), *(self.plant(window, chunk) if here else [])]
        return spoilt


def _spoil(target: Any, edit: Edit, *paths: str) -> Callable[[int, int], list[Pass]]:
    return lambda window, chunk: [Spoil(target, edit, *paths)]


def _window(change: Callable[[int], int], path: str) -> Callable[[int, int], list[Pass]]:
    """An attention with another window; 0 sees every earlier key."""
    return lambda window, chunk: [Spoil(ops.ATTENTION, option(window=change(window)), path)]


LOGITS, CACHES = frozenset({"logits"}), frozenset({"logits", "cache"})

GRAPH_FAULTS: Mapping[str, GraphFault] = {
    "a window that is one too long": GraphFault(
        plant=_window(lambda window: window + 1, "layers.1.self_attn"),
        behind=FuseAttention, layer=1, op="mask", cause="the window is off by one: 17 keys in place of 16",
        suite=CACHES,
    ),
    "a window that is one too short": GraphFault(
        plant=_window(lambda window: window - 1, "layers.1.self_attn"),
        behind=FuseAttention, layer=1, op="mask", cause="the window is off by one: 15 keys in place of 16",
        suite=LOGITS,
    ),
    "a window that is ignored": GraphFault(
        plant=_window(lambda window: 0, "layers.1.self_attn"),
        behind=FuseAttention, layer=1, op="mask",
        cause="the window is ignored: the local layer sees every earlier key", suite=CACHES,
    ),
    "a window that is ignored over a bounded cache": GraphFault(
        plant=_window(lambda window: 0, "layers.1.self_attn"),
        behind=BoundLocalCaches, layer=1, op="mask",
        cause="the local layer sees every earlier key, as far as its cache holds them", suite=LOGITS,
    ),
    "a window on a global layer": GraphFault(
        plant=_window(lambda window: window, "layers.2.self_attn"),
        behind=FuseAttention, layer=2, op="mask", cause="the global layer is bounded to the window of 16 keys",
        suite=CACHES,
    ),
    "global angles in local layers": GraphFault(
        plant=lambda window, chunk: [SwapAngles("local")], behind=FuseRotary, layer=0, op="rope",
        cause="the local layer is rotated with the RoPE base of global layers: theta 1e+06 and factor 8", suite=LOGITS,
    ),
    "local angles in global layers": GraphFault(
        plant=lambda window, chunk: [SwapAngles("global")], behind=FuseRotary, layer=2, op="rope",
        cause="the global layer is rotated with the RoPE base of local layers: theta 10000", suite=LOGITS,
    ),
    "a cache of a window's slots": GraphFault(
        plant=lambda window, chunk: [BoundLocalCaches(1)], behind=BoundLocalCaches, replaces=True,
        layer=0, op="cache write",
        cause="the local layer's cache has 16 slots, 52 are needed for a window of 16 and chunks of 37", suite=LOGITS,
    ),
    "a norm without its one": GraphFault(
        plant=_spoil(ops.RMS_NORM, _bare_weight, "layers.1.post_attention_layernorm"),
        behind=FuseNorms, layer=1, op="norm", cause="multiplies by w in place of 1 + w", suite=LOGITS,
    ),
    "scores without a scale": GraphFault(
        plant=_spoil(ops.ATTENTION, option(scale=1.0), "layers.2.self_attn"),
        behind=FuseAttention, layer=2, op="softmax", cause="the scores are not scaled", suite=LOGITS,
    ),
    "a window in a late layer only": GraphFault(
        plant=_window(lambda window: window + 1, "layers.4.self_attn"),
        behind=FuseAttention, layer=4, op="mask", cause="off by one: 17 keys in place of 16",
    ),
    "the first of two": GraphFault(
        plant=lambda window, chunk: [
            Spoil(ops.ATTENTION, option(window=0), "layers.4.self_attn"),
            Spoil(ops.ATTENTION, option(scale=2 * SCALE), "layers.3.self_attn"),
        ],
        behind=FuseAttention, layer=3, op="softmax", cause="the softmax scale is 0.3162 in place of 0.1581",
    ),
    "a global cache of a local one's slots": GraphFault(
        plant=lambda window, chunk: [BoundEveryCache(chunk, window)], behind=BoundLocalCaches, replaces=True,
        layer=2, op="cache write", cause="the global layer's cache has 52 slots, it must grow with the context",
        suite=CACHES,
    ),
    "a cache that grows": GraphFault(
        plant=lambda window, chunk: [], behind=BoundLocalCaches, replaces=True, layer=None, op=None,
        suite=frozenset({"cache"}),
    ),
    "one slot too few": GraphFault(
        plant=lambda window, chunk: [BoundLocalCaches(chunk - 1)], behind=BoundLocalCaches, replaces=True,
        layer=0, op="cache write", cause="the local layer's cache has 51 slots, 52 are needed", suite=LOGITS,
    ),
    "a quantised projection": GraphFault(
        plant=_spoil(LINEAR, weight(int8), "layers.2.mlp.down_proj"),
        behind=FuseAttention, layer=2, op="quantisation", cause="the weights are rounded to 8 bits in blocks of 32",
    ),
    "a quantised gate": GraphFault(
        plant=_spoil(LINEAR, weight(int8), "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"),
        behind=FuseAttention, layer=1, op="quantisation", cause="the weights are rounded to 8 bits in blocks of 32",
    ),
    "a perturbed projection": GraphFault(
        plant=_spoil(LINEAR, weight(_one_weight), "layers.3.self_attn.o_proj"),
        behind=FuseAttention, layer=3, op="projection", cause="1 of 64 output rows differ (first 7)",
    ),
    "another layer's weights": GraphFault(
        plant=_spoil(LINEAR, _first_weights, "layers.4.self_attn.q_proj"),
        behind=FuseAttention, layer=4, op="projection", cause="the weights are those of layers.0.self_attn.q_proj",
    ),
    "positions one too large": GraphFault(
        plant=lambda window, chunk: [LateAngles()],
        behind=FuseRotary, layer=0, op="rope", cause="RoPE's positions are one too large",
    ),
    "another epsilon": GraphFault(
        plant=_spoil(ops.RMS_NORM, argument(2, 1e-2), "layers.3.pre_feedforward_layernorm"),
        behind=FuseNorms, layer=3, op="norm", cause="epsilon is 0.01 in place of 1e-06",
    ),
    "a residual that is lost": GraphFault(
        plant=_spoil(aten.add.Tensor, lambda _, node: node.replace_all_uses_with(node.args[1]), "layers.5"),
        behind=FuseNorms, layer=5, op="residual", cause="the stream is lost: only the branch comes out",
    ),
    "a factor": GraphFault(
        plant=_spoil(LINEAR, result(aten.mul.Tensor, 1.5), "layers.1.self_attn.v_proj"),
        behind=FuseAttention, layer=1, op="projection", cause="the output is multiplied by 1.5",
    ),
    "something never seen before": GraphFault(
        plant=_spoil(LINEAR, result(aten.sin.default), "layers.2.mlp.down_proj"),
        behind=FuseAttention, layer=2, op="projection", cause="known causes reproduces the difference", suite=LOGITS,
    ),
    "unscaled embedding": GraphFault(
        plant=_spoil(aten.mul.Tensor, argument(1, 1.0), ""),
        behind=FuseAttention, layer=None, op="embedding", cause="the embedding is not multiplied by 8", suite=LOGITS,
    ),
    "capped logits": GraphFault(
        plant=_spoil(aten.index_select.default, lambda g, n: _cap(g, n), ""),
        behind=FuseAttention, layer=None, op="logits", cause="the logits are capped at 30",
    ),
    "a window where keys are attended before they are written": GraphFault(
        plant=_window(lambda window: window - 1, "layers.3.self_attn"),
        behind=FuseAttention, layer=3, op="mask", cause="off by one: 15 keys in place of 16", target="xla",
    ),
}  # fmt: skip


def _cap(graph: Graph, node: Node) -> None:
    for call in ((aten.div.Tensor, 30.0), (aten.tanh.default,), (aten.mul.Tensor, 30.0)):
        result(*call)(graph, node)
        node = next(user for user in node.users if user.target is call[0])
