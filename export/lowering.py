"""Tables of lowerings: one small function for an operation, the same for every target."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transom.errors import UnsupportedOpsError
from transom.graphs.graph import Graph
from transom.graphs.match import source_line

Function = TypeVar("Function", bound=Callable[..., Any])


class Table(dict[Any, Callable[..., Any]]):
    """Lowerings by exact operation; registering one twice is an error."""

    def lowers(self, *targets: Any) -> Callable[[Function], Function]:
        """Register a function as the lowering of some operations."""

        def register(function: Function) -> Function:
            for target in targets:
                if target in self:
                    raise ValueError(f"{target} is lowered by {self[target].__name__} already")
                self[target] = function
            return function

        return register

    def replaces(self, *targets: Any) -> Callable[[Function], Function]:
        """Register a function in place of the one that the table has."""
        for target in targets:
            del self[target]
        return self.lowers(*targets)


def require_supported(graph: Graph, lowerings: Mapping[Any, Any], target: str) -> None:
    """Check that a table has every operation of a graph.

    Raises:
        UnsupportedOpsError: Naming every operation that it lacks, a line each with its count and one source line.
    """
    known = {*lowerings, operator.getitem}
    missing = [node for node in graph.calls_all() if node.target not in known]
    first = {node.target: node for node in reversed(missing)}
    if missing:
        rows = "\n".join(
            f"  {count:4d} x {operation} [{source_line(first[operation]) or first[operation].name}]"
            for operation, count in Counter(node.target for node in missing).most_common()
        )
        raise UnsupportedOpsError(f"the target {target!r} cannot lower these operations:\n{rows}")
