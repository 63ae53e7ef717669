"""A site run again on recorded values: as the graph says, or with some of its nodes changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx.node import map_arg

from transom.graphs.match import aten, is_call
from transom.graphs.node import Node, is_node
from transom.validation.bisection.context import Context, Rows, Site

KEPT = 2**26
"""Bytes of the largest value that is kept from one run of a site to the next; larger ones are computed again."""

Change = Callable[[Callable[[Node], Any]], Any]
"""Gets a function that returns the value of any node (of the changed node itself, as the graph says)."""

Changes = Mapping[Node, Change | Rows]
"""What takes the place of nodes; `Rows` that of weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """A site, and the numbers of one run there. All positions are run at once, from empty caches of as many slots.

    Attributes:
        site: The site.
        context: The model.
        inputs: Recorded values of the site's inputs, float32 [rows, ...] each.
        output: What the run gave, float32 [rows, ...].
        calls: (start, count) of every call.
        slots: Of the caches; by default as many as there are rows.
    """

    site: Site
    context: Context
    inputs: Mapping[Node, torch.Tensor]
    output: torch.Tensor
    calls: tuple[tuple[int, int], ...]
    slots: int | None = None

    @property
    def positions(self) -> torch.Tensor:
        """Position of every token, int64 [T]."""
        return torch.cat([torch.arange(start, start + count) for start, count in self.calls])

    def weights(self) -> dict[Node, str]:
        """Names of the weights that the site reads."""
        names = self.context.weight_names
        return {node: names[node.name] for node in self.site.nodes if node.op == "placeholder" and node.name in names}

    def first(self, count: int) -> Replay:
        """The first rows alone, which no later row bears on."""
        calls = tuple((start, min(size, count - start)) for start, size in self.calls if start < count)
        inputs = {node: value[:count] for node, value in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs, output=self.output[:count], calls=calls)

    def run(self, changes: Changes | None = None, inputs: Mapping[Node, torch.Tensor] | None = None) -> torch.Tensor:
        """The output, float32 [rows, ...].

        Args:
            changes: What takes the place of nodes.
            inputs: What takes the place of inputs, [rows, ...].
        """
        given: dict[Node, Change | Rows] = dict(changes or {})
        for node, value in (inputs or {}).items():
            given[node] = lambda _, node=node, value=value: self._graph_layout(node, value)  # type: ignore[misc]
        value = self.value(self.site.node, given)[0]
        return value.movedim(self.context.axis(self.site.tap), 0).float().reshape(self.output.shape)  # type: ignore[no-any-return]

    def value(self, wanted: Node, given: Changes | None = None) -> Any:
        """The value of any node of the site, in the graph's layout."""
        given = given or {}
        stale = set(given)
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
            change = given.get(node)
            if change is None:
                value = self._compute(node, value_of, given)
            elif isinstance(change, Rows):
                value = change.read()
            else:
                value = change(lambda used: self._compute(used, value_of, given) if used is node else value_of(used))
            is_large = isinstance(value, torch.Tensor) and value.numel() * value.element_size() > KEPT
            (fresh if is_large else known)[node] = value
            return value

        with torch.no_grad():
            return value_of(wanted)

    @functools.cached_property
    def _kept(self) -> dict[Node, Any]:
        return {}

    def _compute(self, node: Node, value_of: Callable[[Node], Any], given: Changes) -> Any:
        if node in self.inputs:
            return self._graph_layout(node, self.inputs[node])
        if node.op == "placeholder":
            name = self.context.weight_names.get(node.name)
            return self._stand_in(node) if name is None else self.context.rows(name).read()
        if is_call(node, aten.embedding.default, aten.linear.default):
            table, x = node.args[:2] if node.target is aten.embedding.default else node.args[1::-1]
            change, name = given.get(table), self.context.weight_names.get(table.name)
            rows = change if isinstance(change, Rows) else None if name is None else self.context.rows(name)
            if rows is not None and node.target is aten.embedding.default:
                return rows.look_up(value_of(x))
            if rows is not None:
                out = rows.project(value_of(x))
                return out + value_of(node.args[2]) if len(node.args) > 2 and node.args[2] is not None else out
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        return node.target(*args, **kwargs)

    def _stand_in(self, node: Node) -> Any:
        """An input of the graph: the ids, position 0, all rows, and caches of zeros."""
        rows, graph = len(self.output), self.context.graph
        (name,) = (name for name, each in graph.inputs.items() if each is node)
        if (state := graph.states.get(name)) is not None:
            return torch.zeros(state.shape(rows if self.slots is None else self.slots))
        if name == "start":
            return self.positions[0]
        return torch.arange(rows) if name == "logit_positions" else torch.tensor([list(self.context.tokens[:rows])])

    def _graph_layout(self, node: Node, value: torch.Tensor) -> torch.Tensor:
        shape = node.meta["val"].shape[1:]
        axis = next(axis for axis, size in enumerate(shape) if not isinstance(size, int))
        wanted = [size for size in shape if isinstance(size, int)]
        return value.reshape(len(value), *wanted).movedim(0, axis)[None]


def scalars(node: Node) -> dict[int, float]:
    """Numbers among a call's arguments, by index."""
    return {
        index: float(value)
        for index, value in enumerate(node.args)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_node(value)
    }


def with_argument(node: Node, index: int, number: float) -> Change:
    """The same call with another number."""

    def change(value_of: Callable[[Node], Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        return node.target(*args[:index], number, *args[index + 1 :], **kwargs)

    return change
