"""The manager: it refuses wrong orders, lies, and passes that break the IR."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest

from transom.errors import InvariantError, TargetError
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.passes.base import Pass, Pipeline, Rewrite
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.pipelines import PIPELINES, pipeline


class Idle(Pass):
    """Changes nothing, and says so."""

    claimed: ClassVar[int] = 0

    def rewrite(self, graph: Graph) -> Rewrite:
        return Rewrite(changes=self.claimed)


class Boasts(Idle):
    """Changes nothing, and says it did."""

    claimed = 3


class Hides(Pass):
    """Changes something, and says it did not."""

    def rewrite(self, graph: Graph) -> Rewrite:
        node = graph.calls(aten.linear.default)[0]
        node.replace_all_uses_with(node.args[0])
        return Rewrite(changes=0)


class Breaks(Pass):
    """Hides a weight."""

    def rewrite(self, graph: Graph) -> Rewrite:
        node = graph.calls(aten.mul.Tensor)[0]
        with graph.fx.inserting_before(node):
            graph.call(aten.neg.default, (node.args[0],), node)
        graph.weights.pop("norm.weight")
        node.replace_all_uses_with(node.args[0])
        return Rewrite(changes=1)


class BreaksItsPromise(Idle):
    """Cannot do what it is for."""

    def ensures(self, graph: Graph) -> None:
        raise InvariantError("nothing was done")


class AsksTooMuch(Idle):
    """Requires what no graph has."""

    def requires(self, graph: Graph) -> None:
        raise InvariantError("no graph is good enough")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Boasts(), "Boasts reported 3 changes, but the graph is as it was"),
        (Hides(), "Hides reported 0 changes, but the graph changed"),
        (Breaks(), "no recipe"),
        (BreaksItsPromise(), "nothing was done"),
        (AsksTooMuch(), "no graph is good enough"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_bad_pass_is_an_error(scored: Graph, broken: Pass, message: str) -> None:
    before = scored.digest()
    Pipeline([Idle()]).run(scored)
    with pytest.raises(InvariantError, match=message):
        Pipeline([broken]).run(scored)
    assert scored.digest() == before


def test_a_bad_graph_is_refused_before_the_first_pass(scored: Graph) -> None:
    graph = scored.clone()
    graph.weights.pop("norm.weight")
    with pytest.raises(InvariantError, match="no recipe"):
        Pipeline([]).run(graph)


def test_order_is_checked_when_the_list_is_built() -> None:
    with pytest.raises(InvariantError, match="FuseAttention must run after Canonicalize"):
        Pipeline([FuseAttention(), Canonicalize()])
    with pytest.raises(InvariantError, match="BoundLocalCaches must run after FuseAttention, FuseCacheWrites"):
        Pipeline([Canonicalize(), BoundLocalCaches(4), FuseCacheWrites(), FuseAttention()])
    Pipeline([FuseAttention()])


@pytest.mark.parametrize("target", PIPELINES)
@pytest.mark.parametrize("task", ["traced", "scored"])
def test_records_tell_what_happened(request: pytest.FixtureRequest, target: str, task: str) -> None:
    graph: Graph = request.getfixturevalue(task)
    seen: list[str] = []
    passes = pipeline(target, chunk=4, scheme=scheme("none"))
    result, records = passes.run(graph, on_pass=lambda ran, _: seen.append(ran.name))
    assert [record.name for record in records] == seen == [current.name for current in passes.passes]
    assert records[0].nodes_before == len(graph.calls_all())
    assert records[-1].nodes_after == len(result.calls_all())
    assert all(a.nodes_after == b.nodes_before for a, b in itertools.pairwise(records))
    assert records[0].weight_bytes_before == graph.weight_bytes()
    assert records[-1].weight_bytes_after == result.weight_bytes()
    assert all(set(record.to_json()) >= {"name", "changes", "seconds", "skipped"} for record in records)


def test_every_run_gives_the_same_graph(traced: Graph) -> None:
    """Names and order of weights too: an export has the same bytes each time."""
    first, second = (pipeline("tvm", chunk=4, scheme=scheme("none")).run(traced)[0] for _ in range(2))
    assert first.digest() == second.digest()
    assert list(first.weights) == list(second.weights)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(TargetError, match="'abacus': choose one of onnxruntime"):
        pipeline("abacus", chunk=4, scheme=scheme("none"))
