"""What a pass is, and how a list of passes is run."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from transom.errors import InvariantError
from transom.graphs.check import check
from transom.graphs.graph import Graph, refresh

Digest = tuple[str, ...]
"""What `Graph.digest` returns."""

Measurement = Callable[[Graph], Mapping[str, float]]
"""Takes the graph that a pass is about to rewrite, and returns one number by name; see the passes that ask for one."""

R = TypeVar("R", bound="Rewrite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite:
    """What one run of a pass did to a graph; a pass that has more to tell returns a subclass.

    Attributes:
        changes: Sites changed.
        skipped: Sites that looked like a match and were left alone, each with the reason.
        notes: What else a reader of the artifact should know.
    """

    changes: int
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Pass(abc.ABC):
    """One rewrite. A pass edits a graph in place and returns what it did; it remembers nothing of its runs.

    Attributes:
        after: Passes that must run earlier in any list that holds them too.
    """

    after: ClassVar[tuple[type[Pass], ...]] = ()

    @property
    def name(self) -> str:
        """Name for records."""
        return type(self).__name__

    def requires(self, graph: Graph) -> None:  # noqa: B027 (most passes have nothing to require)
        """Raise `InvariantError` if the graph cannot be rewritten."""

    @abc.abstractmethod
    def rewrite(self, graph: Graph) -> Rewrite:
        """Edit `graph`."""

    def ensures(self, graph: Graph) -> None:  # noqa: B027 (most passes have nothing more to promise)
        """Raise `InvariantError` if the result is not what the pass promises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did, and what it cost.

    Attributes:
        name: The pass.
        rewrite: What it returned.
        seconds: Time taken, checks included.
        nodes_before: Calls in the graph before.
        nodes_after: Calls in the graph after.
        weight_bytes_before: Bytes of all weights before.
        weight_bytes_after: Bytes of all weights after.
    """

    name: str
    rewrite: Rewrite
    seconds: float
    nodes_before: int
    nodes_after: int
    weight_bytes_before: int
    weight_bytes_after: int

    @property
    def changes(self) -> int:
        """Sites changed."""
        return self.rewrite.changes

    @property
    def skipped(self) -> tuple[str, ...]:
        """Sites left alone; see `Rewrite`."""
        return self.rewrite.skipped

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Rewrite`."""
        return self.rewrite.notes

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "name": self.name,
            "changes": self.changes,
            "seconds": round(self.seconds, 3),
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "weight_bytes_before": self.weight_bytes_before,
            "weight_bytes_after": self.weight_bytes_after,
            "skipped": list(self.skipped),
            "notes": list(self.notes),
        }


def rewrites(records: Iterable[PassRecord], kind: type[R]) -> list[R]:
    """What passes returned, of those that returned this kind."""
    return [record.rewrite for record in records if isinstance(record.rewrite, kind)]


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
    current.requires(graph)
    rewrite = current.rewrite(graph)
    if rewrite.changes:
        graph.drop_dead_code()
        graph.settle_outputs()
        refresh(graph)
    after = graph.digest()
    if bool(rewrite.changes) != (after != before):
        state = "changed" if not rewrite.changes else "is as it was"
        raise InvariantError(f"{current.name} reported {rewrite.changes} changes, but the graph {state}")
    check(graph)
    current.ensures(graph)
    record = PassRecord(
        name=current.name,
        rewrite=rewrite,
        seconds=time.perf_counter() - began,
        nodes_before=nodes,
        nodes_after=len(graph.calls_all()),
        weight_bytes_before=size,
        weight_bytes_after=graph.weight_bytes(),
    )
    return record, after
