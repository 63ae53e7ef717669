"""The manager: it refuses wrong orders, lies, and passes that break the IR."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch

from transom.errors import InvariantError, TargetError
from transom.formats.schemes import scheme
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.ops import LINEAR_QUANTIZED
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pass, Pipeline, Rewrite
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.fake_quantize import FakeQuantize
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.insert_observers import InsertObservers, input_name, narrow_values
from transom.passes.pipelines import PIPELINES, Measure, pipeline
from transom.passes.share_embedding import ShareEmbedding


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


def ranges(graph: Graph) -> dict[str, float]:
    """One value is out of float16's range."""
    return {name: 1e6 if name == "layers.3.mlp.mul" else 1.0 for name in narrow_values(graph, torch.float16)}


def scales(graph: Graph) -> dict[str, float]:
    """Of what every linear reads."""
    named_codes = [graph.weight_of(node.args[1]) for node in graph.calls(LINEAR_QUANTIZED)]
    return {input_name(named[0]): 0.1 for named in named_codes if named}


MEASURE = Measure(ranges=ranges, scales=scales)
TRAINING = "training"


def listed(name: str) -> list[Pass]:
    """Passes with nothing left out: of a target, or those that stand in no target's list."""
    if name == TRAINING:
        return [AddTaps(), ShareEmbedding(), InsertObservers(), FakeQuantize(scheme("int4"))]
    return pipeline(name, chunk=4, scheme=scheme("fp8_activations"), measure=MEASURE).passes


def test_measured_passes_stand_where_their_graph_is_right() -> None:
    names = [current.name for current in listed("onnxruntime")]
    assert (names[0], names[-1]) == ("GuardRanges", "QuantizeActivations")
    bare = pipeline("onnxruntime", chunk=4, scheme=scheme("fp8_activations")).passes
    assert [current.name for current in bare] == names[1:-1], "without a measurement, nothing that needs one"
    unrounded = pipeline("onnxruntime", chunk=4, scheme=scheme("fp8_channel"), measure=MEASURE).passes
    assert [current.name for current in unrounded] == names[:-1]


@pytest.mark.parametrize("name", [*PIPELINES, TRAINING])
def test_a_pass_remembers_nothing(name: str, traced: Graph, traced_float16: Graph, scored: Graph) -> None:
    """One list runs on two graphs in turn, pass by pass: neither run shows in the other, nor in the passes."""
    graphs = [scored, traced if name == TRAINING else traced_float16]

    def run(lists: Sequence[Sequence[Pass]]) -> list[tuple[Graph, list[Rewrite]]]:
        runs: list[tuple[Graph, list[Rewrite]]] = [(graph, []) for graph in graphs]
        for turn in zip(*lists, strict=True):
            for index, current in enumerate(turn):
                graph, (record,) = Pipeline([current]).run(runs[index][0])
                runs[index] = graph, [*runs[index][1], record.rewrite]
        return runs

    alone, shared = run([listed(name), listed(name)]), listed(name)
    before = [copy.deepcopy(vars(current)) for current in shared]
    together = run([shared, shared])
    assert [vars(current) for current in shared] == before
    for (graph, rewrites), (other_graph, other_rewrites) in zip(alone, together, strict=True):
        assert rewrites == other_rewrites and graph.digest() == other_graph.digest()
    changes = [max(rewrite.changes for rewrite in pair) for pair in zip(*(run[1] for run in together), strict=True)]
    idle = [current.name for current, count in zip(shared, changes, strict=True) if not count]
    assert set(idle) <= {"ShareEmbedding", "FuseExperts"}, "there are no experts, and the tied table is traced as one"
