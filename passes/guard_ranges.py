"""GuardRanges: in a graph of float16, what float16 cannot hold is computed in float32, and nothing else is.

Precondition: a graph as traced in the narrow dtype, before any fusion. The largest magnitude of every value that it
holds in that dtype is measured on a text or on images, as by `export.ranges`; `margin` bits of headroom stand for all
others.
Rewrite: an operation whose result is too large, or that reads a value that is, becomes an island: its inputs are cast
to float32, and its result is cast back where it fits again. A value that stays too large stays float32 from island to
island, such as a residual stream up to the norm that brings it back. A linear in an island gets its weight in float32.
Caches and logits keep the narrow dtype. `notes` names every value that is now float32.
Skips: nothing. Where no island helps, because a weight, a cache or a result is too large itself, it refuses.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.node import map_arg

from transom.errors import InvariantError, RangeError
from transom.graphs.graph import Graph
from transom.graphs.match import CASTS, LAYOUT, aten, is_call
from transom.graphs.node import Node
from transom.passes.add_taps import FUSED
from transom.passes.base import Measurement, Pass, Rewrite
from transom.passes.insert_observers import narrow_values

MARGIN = 1.0

_WIDE = torch.float32
_SPLITS = (aten.chunk.default, aten.split_with_sizes.default, aten.split.Tensor)
_CHOICES = (aten.index_select.default, aten.select.int, aten.masked_fill.Scalar)


class GuardRanges(Pass):
    """Float32 islands around what a narrow dtype cannot hold.

    Args:
        measure: Returns the largest magnitude by name of every value of `narrow_values`, and of weights, if known.
        dtype: The narrow dtype.
        margin: Bits of headroom that a value must have to stay narrow.
    """

    def __init__(self, measure: Measurement, *, dtype: torch.dtype = torch.float16, margin: float = MARGIN) -> None:
        self.measure, self.dtype, self.margin = measure, dtype, margin

    @property
    def limit(self) -> float:
        """Largest magnitude that stays narrow."""
        return float(torch.finfo(self.dtype).max / 2**self.margin)

    def requires(self, graph: Graph) -> None:
        """Nothing is fused."""
        if fused := graph.calls(*FUSED):
            raise InvariantError(f"GuardRanges must run before fusion, but the graph holds {fused[0].target} already")

    def rewrite(self, graph: Graph) -> Rewrite:
        """Put every operation that makes or reads a value out of range into float32; counts them.

        Raises:
            InvariantError: If a narrow value has no range, or is left narrow although it is out of range.
            RangeError: If a weight, a cache or a result is out of range.
        """
        largest, nodes = self.measure(graph), narrow_values(graph, self.dtype)
        if missing := [name for name in nodes if name not in largest]:
            raise InvariantError(
                f"{len(missing)} values have no range, {missing[0]} first: trace the ranges of this very model"
            )
        for name in graph.weights:
            if largest.get(name, 0.0) > torch.finfo(self.dtype).max:
                raise self._refusal(f"the weight {name}", largest[name], 0.0)
        sizes = {node: (name, largest[name]) for name, node in nodes.items() if largest[name] > self.limit}
        hot = _carry(graph, sizes)
        self._refuse_results(graph, hot)
        islands = _Islands(graph, self.dtype, hot)
        changes = sum(islands.widen(node) for node in graph.calls_all())
        if changes:
            islands.return_taps()
            graph.drop_dead_code()
        if left := [name for name in narrow_values(graph, self.dtype) if largest.get(name, 0.0) > self.limit]:
            raise InvariantError(f"{', '.join(left)} should be float32, but a narrow copy is left")
        notes = (f"{name} reaches {size:.4g}, so it is float32" for name, size in dict.fromkeys(sizes.values()))
        return Rewrite(changes=changes, notes=tuple(notes))

    def _refuse_results(self, graph: Graph, hot: Mapping[Node, tuple[str, float]]) -> None:
        taps = {tap.name for tap in graph.taps}
        for name, node in graph.outputs.items():
            if name not in taps and node in hot and node.meta["val"].dtype == self.dtype:
                what = name if name in graph.states else "the result"
                raise self._refusal(f"{what}, from {hot[node][0]},", hot[node][1], self.margin)

    def _refusal(self, what: str, largest: float, margin: float) -> RangeError:
        name, holds = str(self.dtype).removeprefix("torch."), float(torch.finfo(self.dtype).max / 2**margin)
        spare = f" with {margin:g} bits of headroom" if margin else ""
        return RangeError(
            f"{what} reaches {largest:.4g}, of which {name} holds {holds:.4g}{spare}, and no float32 island helps "
            "there: compute in bfloat16 or float32"
        )


def _carry(graph: Graph, sizes: Mapping[Node, tuple[str, float]]) -> dict[Node, tuple[str, float]]:
    """Values out of range, and all that holds the same numbers, with where they come from."""
    hot: dict[Node, tuple[str, float]] = {}
    for node in graph.calls_all():
        if node in sizes:
            hot[node] = sizes[node]
            continue
        for source in _sources(node):
            if source in hot:
                hot[node] = hot[source]
    return hot


def _sources(node: Node) -> list[Any]:
    """What a node takes its numbers from, if it computes none."""
    if is_call(node, aten.where.self):
        return list(node.args[1:3])
    if is_call(node, aten.index_copy.default):
        return [node.args[0], node.args[3]]
    return [node.args[0]] if is_call(node, *CASTS, *LAYOUT, *_SPLITS, *_CHOICES, operator.getitem) else []


class _Islands:
    """Rewrites nodes in the order of execution; `wide` holds what stands in float32 for a narrow value."""

    def __init__(self, graph: Graph, dtype: torch.dtype, hot: Mapping[Node, Any]) -> None:
        self.graph, self.dtype, self.hot = graph, dtype, hot
        self.wide: dict[Node, Node] = {}
        self._casts: dict[Node, Node] = {}

    def widen(self, node: Node) -> bool:
        """Compute a node in float32 if it makes or reads a value out of range; whether it does."""
        reads = any(used in self.wide for used in node.all_input_nodes)
        makes = node in self.hot and self._is_narrow(node)
        if not reads and not makes:
            return False
        if is_call(node, aten._assert_tensor_metadata.default):
            self.graph.fx.erase_node(node)
            return False
        if not isinstance(node.meta["val"], (torch.Tensor, list, tuple)):  # a size
            self._replace(node, self._call(node, self.wide.get))
            return False
        if is_call(node, *CASTS):
            self._recast(node, makes)
            return False
        with self.graph.fx.inserting_before(node):
            operand = self._operand if self._is_narrow(node) else self.wide.get
            new = self._call(node, operand)
            if makes:
                self.wide[node] = new
            elif self._is_narrow(node):
                self._replace(node, self.graph.call(aten.to.dtype, (new, self.dtype), node))
            else:
                self._replace(node, new)
        return True

    def return_taps(self) -> None:
        """A tap of a value that is float32 now returns it as it is."""
        returned = list(self.graph.output.args[0])
        self.graph.output.args = ([self.wide.get(node, node) for node in returned],)

    def _is_narrow(self, node: Node) -> bool:
        value = node.meta["val"]
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        return isinstance(first, torch.Tensor) and first.dtype == self.dtype

    def _call(self, node: Node, operand: Any) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), lambda used: operand(used) or used)
        with self.graph.fx.inserting_before(node):
            new = self.graph.call(node.target, args, node, kwargs)
        return new

    def _operand(self, used: Node) -> Node:
        """An input of an island."""
        if used in self.wide or not self._is_narrow(used):
            return self.wide.get(used, used)
        if used not in self._casts:
            named_weight = self.graph.weight_of(used)
            if named_weight is not None and all(is_call(user, aten.linear.default) for user in used.users):
                name, weight = named_weight
                self._casts[used] = self.graph.add_weight(f"float32.{name}", weight.to(_WIDE))
            else:
                self._casts[used] = self.graph.call(aten.to.dtype, (used, _WIDE), used)
        return self._casts[used]

    def _recast(self, node: Node, makes: bool) -> None:
        source = self.wide.get(node.args[0], node.args[0])
        dtype = _WIDE if makes else node.meta["val"].dtype
        if source.meta["val"].dtype != dtype:
            with self.graph.fx.inserting_before(node):
                source = self.graph.call(aten.to.dtype, (source, dtype), node)
        if makes:
            self.wide[node] = source
        else:
            self._replace(node, source)

    def _replace(self, node: Node, new: Node) -> None:
        node.replace_all_uses_with(new)
        # What stands for a value must be found under the new node too.
        for old, wide in self.wide.items():
            if wide is node:
                self.wide[old] = new
