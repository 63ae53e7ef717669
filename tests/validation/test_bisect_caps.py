"""Faults of attention whose scores are bounded and that has sinks are placed and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.case import Case
from tests.faults.graph import Spoil, argument
from transom.backends.reference.session import ReferenceSession
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pass
from transom.passes.fuse_attention import FuseAttention
from transom.validation.bisection.context import Context
from transom.validation.bisection.divergence import compare
from transom.validation.bisection.recording import Recording, plan_calls, record
from transom.zoo import layers
from transom.zoo.model import load

CHUNK = 21
CALLS = plan_calls(window=16, chunk=CHUNK, decode=4)
TOTAL = CALLS[-1].stop


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    """gemma2-tiny, and a sink for each of its heads."""
    attend = layers.attend

    def with_sinks(*args: Any, **options: Any) -> Any:
        return attend(*args, sinks_N=torch.arange(4) - 1.0, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "attend", with_sinks)
        model = load("gemma2-tiny")
        # Another name: a configuration is traced once for all tests of a process.
        graph = dataclasses.replace(model, config=dataclasses.replace(model.config, name="gemma2-sinks")).trace()
    ids = torch.randint(0, 384, (TOTAL,), generator=torch.Generator().manual_seed(3))
    yield Context(graph=Case(graph=graph).run(AddTaps()).graph, tokens=ids.tolist())


def run(graph: Graph, context: Context) -> Recording:
    return record(ReferenceSession(graph, context=256, chunk=CHUNK), CALLS, context)


@pytest.fixture(scope="module")
def right(context: Context) -> Recording:
    return run(context.graph, context)


def _uncapped(graph: Graph, node: Node) -> None:
    """`tanh(x / 2) * 2` becomes x."""
    (bounded,) = node.users
    bounded.replace_all_uses_with(node.args[0].args[0])


def _without_sinks(graph: Graph, node: Node) -> None:
    if is_call(next(iter(node.users)), aten.softmax.int):
        masked, column = node.args[0]
        with graph.fx.inserting_before(node):
            gone = graph.call(aten.sub.Tensor, (column, 1e9), node)
        node.args = ([masked, gone], -1)


FAULTS: dict[str, tuple[Callable[[], Pass], str]] = {
    "no cap": (lambda: Spoil(aten.tanh.default, _uncapped, "layers.2.self_attn"), "the scores are not capped"),
    "no sinks": (lambda: Spoil(aten.cat.default, _without_sinks, "layers.2.self_attn"), "the sinks are left out"),
    "a window": (lambda: Spoil(aten.lt.Scalar, argument(1, 15), "layers.2.self_attn"), "the window is off by one: 15"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_placed_and_named(name: str, context: Context, right: Recording) -> None:
    fault, cause = FAULTS[name]
    verdict = compare(right, run(Case(graph=context.graph).run(fault()).graph, context), context)
    assert (verdict.diverged, verdict.layer, verdict.side) == (True, 2, "b"), verdict
    assert cause in verdict.cause


def test_taps_outlive_fusion(context: Context, right: Recording) -> None:
    fused = Case(graph=context.graph).run(FuseAttention()).expect_skipped()
    assert not compare(right, run(fused.graph, context), context).diverged
    assert [tap.name for tap in context.graph.taps if tap.op == "attention"] == [
        f"tap.layers.{layer}.self_attn.attention" for layer in range(4)
    ]
