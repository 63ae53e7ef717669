"""A site run again on recorded values: as the graph says, or as a hypothesis says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.fx.node import map_arg

from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.validation.bisection.context import Context, Rows, Site, positions_axis

KEPT = 2**26
"""Bytes of the largest value that is kept from one run of a site to the next; larger ones are computed again."""

RIGHT = "it does what the model says"

Change = Callable[[Callable[[Node], Any]], Any]
"""Gets a function that returns the value of any node (of the changed node itself, as the graph says)."""

Changes = Mapping[Node, Change | Rows]
"""What takes the place of nodes; `Rows` that of weights."""


def identity(value: torch.Tensor) -> torch.Tensor:
    """The value itself."""
    return value


def from_node(node: Node, function: Callable[[Any], Any] = identity) -> Change:
    """A function of a node's value."""
    return lambda value_of: function(value_of(node))


def with_argument(node: Node, index: int, number: float) -> Change:
    """The same call with another number."""

    def change(value_of: Callable[[Node], Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        return node.target(*args[:index], number, *args[index + 1 :], **kwargs)

    return change


class Hypothesis(NamedTuple):
    """A possible cause, and what would be different at the site if it were true.

    Attributes:
        changes: What would take the place of nodes.
        output: What would become of the output, float32 [rows, ...].
        op: The word for the verdict; "" is the site's own.
    """

    cause: str
    changes: Changes = MappingProxyType({})
    output: Callable[[torch.Tensor], torch.Tensor] = identity
    op: str = ""

    def predict(self, replay: Replay) -> torch.Tensor:
        """What the site would give, float32 [rows, ...]."""
        return self.output(replay.run(self.changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """A site, and the numbers of one run there. All positions are run at once, from empty caches of as many slots.

    Attributes:
        inputs: Recorded values of the site's inputs, float32 [rows, ...] each.
        output: What the run gave, float32 [rows, ...].
        calls: Positions of every call.
        recorded: Values of all tapped nodes in that run, float32 [rows, ...] each.
        slots: Of the caches; by default as many as there are rows.
    """

    site: Site
    context: Context
    inputs: Mapping[Node, torch.Tensor]
    output: torch.Tensor
    calls: tuple[range, ...]
    recorded: Mapping[Node, torch.Tensor] = dataclasses.field(default_factory=dict)
    slots: int | None = None
    _kept: dict[Node, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def positions(self) -> torch.Tensor:
        """Position of every token, int64 [T]."""
        return torch.tensor([*itertools.chain(*self.calls)])

    def weights(self) -> dict[Node, str]:
        """Names of the weights that the site reads."""
        return self.context.weights(self.site)

    def first(self, count: int) -> Replay:
        """The first rows alone, and those that bear on them."""
        if self.context.pixels is not None:
            return self
        count = next((end for first, end in self.context.prompt.blocks() if first < count < end), count)
        calls = tuple(range(call.start, min(call.stop, count)) for call in self.calls if call.start < count)
        inputs, recorded = (
            {node: value[:count] for node, value in values.items()} for values in (self.inputs, self.recorded)
        )
        return dataclasses.replace(self, inputs=inputs, recorded=recorded, output=self.output[:count], calls=calls)

    def run(self, changes: Changes | None = None) -> torch.Tensor:
        """The output, float32 [rows, ...]."""
        value = self.value(self.site.node, changes)[0]
        return value.movedim(self.context.axis(self.site.tap.name), 0).float().reshape(self.output.shape)  # type: ignore[no-any-return]

    def value(self, wanted: Node, changes: Changes | None = None) -> Any:
        """The value of any node of the site, in the graph's layout."""
        changes = changes or {}
        stale = set(changes)
        for node in self.site.nodes:
            if any(used in stale for used in node.all_input_nodes):
                stale.add(node)
        fresh: dict[Node, Any] = {}

        def value_of(node: Node) -> Any:
            known = fresh if node in stale else self._kept
            if node in known:
                return known[node]
            if node in fresh:
                return fresh[node]
            change = changes.get(node)
            if change is None:
                value = self._compute(node, value_of, changes)
            elif isinstance(change, Rows):
                value = change.read()
            else:
                value = change(lambda used: self._compute(used, value_of, changes) if used is node else value_of(used))
            is_large = isinstance(value, torch.Tensor) and value.numel() * value.element_size() > KEPT
            (fresh if is_large else known)[node] = value
            return value

        with torch.no_grad():
            return value_of(wanted)

    def in_graph(self, node: Node, value: torch.Tensor) -> torch.Tensor:
        """A value [rows, ...] in the layout that a tapped node has in the graph."""
        axis, shape = positions_axis(node), node.meta["val"].shape[1:]
        return value.reshape(len(value), *shape[:axis], *shape[axis + 1 :]).movedim(0, axis)[None]

    def _compute(self, node: Node, value_of: Callable[[Node], Any], changes: Changes) -> Any:
        if node in self.inputs:
            return self.in_graph(node, self.inputs[node])
        if node.op == "placeholder":
            name = self.context.weight_names.get(node.name)
            return self._stand_in(node) if name is None else self.context.rows(name).read()
        if is_call(node, aten.embedding.default, aten.linear.default):
            table, x = node.args[:2] if node.target is aten.embedding.default else node.args[1::-1]
            change, name = changes.get(table), self.context.weight_names.get(table.name)
            rows = change if isinstance(change, Rows) else None if name is None else self.context.rows(name)
            if rows is not None and node.target is aten.embedding.default:
                return rows.look_up(value_of(x))
            if rows is not None:
                out = rows.project(value_of(x))
                return out + value_of(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else out
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        return node.target(*args, **kwargs)

    def _stand_in(self, node: Node) -> Any:
        """An input of the graph: what ran, position 0, all rows, and caches of zeros."""
        rows, graph = len(self.output), self.context.graph
        (name,) = (name for name, each in graph.inputs.items() if each is node)
        if (state := graph.states.get(name)) is not None:
            return torch.zeros(state.shape(rows if self.slots is None else self.slots))
        if name == "start":
            return self.positions[0]
        if name == "logit_positions":
            return torch.arange(rows)
        value, at = self.context.given[name], self.positions[:rows]
        return value if name == "pixels" else value[at] if value.dim() == 1 else value[:, at]
