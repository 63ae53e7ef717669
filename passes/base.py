"""What a pass is, and how a list of passes is run."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from transom.errors import InvariantError
from transom.graphs.check import check
from transom.graphs.graph import Graph, refresh

Digest = tuple[str, ...]
"""What `Graph.digest` returns."""


class Pass(abc.ABC):
    """One rewrite. A pass edits the graph in place and tells how many sites it changed.

    Attributes:
        after: Passes that must run earlier in any list that holds them too.
        skipped: Sites that looked like a match and were left alone in the last run, each with the reason.
        notes: What a reader of the artifact should know of the last run.
    """

    after: ClassVar[tuple[type[Pass], ...]] = ()

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        """Name for records."""
        return type(self).__name__

    def requires(self, graph: Graph) -> None:  # noqa: B027 (most passes have nothing to require)
        """Raise `InvariantError` if the graph cannot be rewritten."""

    @abc.abstractmethod
    def rewrite(self, graph: Graph) -> int:
        """Edit `graph` and return the number of sites changed. Sites left alone go to `self.skipped`, with why."""

    def ensures(self, graph: Graph) -> None:  # noqa: B027 (most passes have nothing more to promise)
        """Raise `InvariantError` if the result is not what the pass promises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: The pass.
        changes: Sites changed.
        seconds: Time taken, checks included.
        nodes_before: Calls in the graph before.
        nodes_after: Calls in the graph after.
        weight_bytes_before: Bytes of all weights before.
        weight_bytes_after: Bytes of all weights after.
        skipped: Sites that looked like a match and were left alone, each with the reason.
        notes: What else a reader of the artifact should know.
    """

    name: str
    changes: int
    seconds: float
    nodes_before: int
    nodes_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            **dataclasses.asdict(self),
            "seconds": round(self.seconds, 3),
            "skipped": list(self.skipped),
            "notes": list(self.notes),
        }


class Pipeline:
    """A list of passes, run in order.

    Raises:
        InvariantError: When built, if a pass stands before one that it must follow.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        kinds = [type(p) for p in passes]
        for index, kind in enumerate(kinds):
            if late := [other.__name__ for other in kind.after if other in kinds[index + 1 :]]:
                raise InvariantError(f"{kind.__name__} must run after {', '.join(late)}")
        self.passes = list(passes)

    def run(
        self, graph: Graph, *, on_pass: Callable[[Pass, Graph], None] | None = None
    ) -> tuple[Graph, list[PassRecord]]:
        """Run every pass on a copy of the graph.

        Args:
            graph: Left as it is.
            on_pass: Called with each pass and the graph it left behind, whose module is compiled at the end only.

        Raises:
            InvariantError: If a pass breaks the IR's rules, its own promise, or lies about its count.
        """
        graph, records = graph.clone(), []
        check(graph)
        digest = graph.digest()
        for current in self.passes:
            record, digest = _apply(current, graph, digest)
            records.append(record)
            if on_pass is not None:
                on_pass(current, graph)
        graph.module.recompile()
        return graph, records


def _apply(current: Pass, graph: Graph, before: Digest) -> tuple[PassRecord, Digest]:
    began = time.perf_counter()
    nodes, size = len(graph.calls_all()), graph.weight_bytes()
    current.skipped, current.notes = [], []
    current.requires(graph)
    changes = current.rewrite(graph)
    if changes:
        graph.drop_dead_code()
        graph.settle_outputs()
        refresh(graph)
    after = graph.digest()
    if bool(changes) != (after != before):
        state = "changed" if not changes else "is as it was"
        raise InvariantError(f"{current.name} reported {changes} changes, but the graph {state}")
    check(graph)
    current.ensures(graph)
    record = PassRecord(
        name=current.name,
        changes=changes,
        seconds=time.perf_counter() - began,
        nodes_before=nodes,
        nodes_after=len(graph.calls_all()),
        weight_bytes_before=size,
        weight_bytes_after=graph.weight_bytes(),
        skipped=tuple(current.skipped),
        notes=tuple(current.notes),
    )
    return record, after
