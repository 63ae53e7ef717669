"""Every rule of the IR, each with a graph that breaks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.conftest import Stage
from transom.errors import InvariantError
from transom.graphs.check import check
from transom.graphs.graph import Graph, fake_mode
from transom.graphs.match import aten
from transom.graphs.weight import Weight

NORM = "layers.0.input_layernorm.weight"


def use_before_definition(graph: Graph) -> None:
    first, *_, last = graph.calls_all()
    first.prepend(last)


def unknown_shape(graph: Graph) -> None:
    graph.calls(aten.linear.default)[3].meta.pop("val")


def no_recipe(graph: Graph) -> None:
    del graph.weights[NORM]


def wrong_recipe_shape(graph: Graph) -> None:
    graph.weights[NORM] = Weight.of(torch.zeros(65))


def wrong_recipe_dtype(graph: Graph) -> None:
    graph.weights[NORM] = graph.weights[NORM].to(torch.bfloat16)


def cache_shape_in_is_not_shape_out(graph: Graph) -> None:
    node = graph.inputs["cache.0.key"]
    batch, heads, _, width = node.meta["val"].shape
    with fake_mode(graph):
        node.meta["val"] = node.meta["val"].new_empty((batch, heads, 40, width))


def cache_dtype_in_is_not_dtype_out(graph: Graph) -> None:
    node = graph.inputs["cache.0.key"]
    with fake_mode(graph):
        node.meta["val"] = node.meta["val"].to(torch.bfloat16)


def cache_slots_are_not_as_declared(graph: Graph) -> None:
    state = graph.states["cache.0.key"]
    graph.states = {**graph.states, state.name: dataclasses.replace(state, sizes=(None, 2, 40, 32))}


def caches_swapped(graph: Graph) -> None:
    """A bounded and a growing cache trade places among the outputs; the signature follows."""
    returned = list(graph.output.args[0])
    returned[1], returned[5] = returned[5], returned[1]
    graph.output.args = (tuple(returned),)
    graph.settle_outputs()


def inputs_out_of_order(graph: Graph) -> None:
    graph.program.graph_signature.input_specs.reverse()


def input_missing_in_signature(graph: Graph) -> None:
    graph.program.graph_signature.input_specs.pop()


def outputs_out_of_order(graph: Graph) -> None:
    returned = list(graph.output.args[0])
    returned[1], returned[2] = returned[2], returned[1]
    graph.output.args = (tuple(returned),)


def something_torch_rejects(graph: Graph) -> None:
    node = graph.calls(aten.linear.default)[0]
    with graph.fx.inserting_before(node):
        graph.fx.call_function(print, ()).meta["val"] = None


FAULTS: list[tuple[Callable[[Graph], None], str]] = [
    (use_before_definition, "not well formed"),
    (unknown_shape, "no shape is known for \\['linear_3'\\]"),
    (no_recipe, "no recipe"),
    (wrong_recipe_shape, r"holds \(65,\) but was traced as \(64,\)"),
    (wrong_recipe_dtype, "bfloat16"),
    (cache_shape_in_is_not_shape_out, r"cache\.0\.key goes in as"),
    (cache_dtype_in_is_not_dtype_out, r"cache\.0\.key goes in as"),
    (cache_slots_are_not_as_declared, r"cache\.0\.key declares 40 slots"),
    (inputs_out_of_order, "inputs in order"),
    (input_missing_in_signature, "inputs in order"),
    (outputs_out_of_order, "outputs in order"),
    (something_torch_rejects, "torch's verifier rejects"),
]


@pytest.mark.parametrize(("break_it", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_rule_is_named(traced: Graph, break_it: Callable[[Graph], None], message: str) -> None:
    graph = traced.clone()
    check(graph)
    break_it(graph)
    with pytest.raises(InvariantError, match=message):
        check(graph)


def test_swapped_caches_of_different_sizes(stages: list[Stage]) -> None:
    graph = stages[-1].graph.clone()
    check(graph)
    caches_swapped(graph)
    with pytest.raises(InvariantError, match=r"cache\.0\.key goes in as"):
        check(graph)
