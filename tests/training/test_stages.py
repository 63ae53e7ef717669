"""A graph in stages: the same numbers and gradients as the whole, with or without computing layers again."""

from __future__ import annotations

import pytest
import torch

from transom.errors import InvariantError
from transom.graphs.graph import Graph
from transom.training.quantize import score_graph
from transom.training.stages import Stages
from transom.zoo.model import Model


@pytest.fixture(scope="module")
def graph(tiny: Model) -> Graph:
    return score_graph(tiny)


def test_hidden_states_are_those_of_the_module(tiny: Model, graph: Graph, text: list[int]) -> None:
    """Ten windows long."""
    stages = Stages(graph)
    weights = {name: weight.read() for name, weight in graph.weights.items()}
    tokens_BT, module = torch.tensor([text, text[::-1]]), tiny.eager()
    with torch.no_grad():
        hidden = stages.hidden(tokens_BT, weights)
        expected, _ = module(tokens_BT, torch.tensor(0), None)
    assert torch.equal(torch.nn.functional.linear(hidden, weights["embed_tokens.weight"]), expected)


def test_a_layer_reads_only_its_own_weights(tiny: Model, graph: Graph) -> None:
    stages = Stages(graph).stages
    assert [stage.layer for stage in stages] == [None, *range(tiny.config.num_layers), None]
    for stage in stages:
        if stage.layer is not None:
            assert stage.weights and all(name.startswith(f"layers.{stage.layer}.") for name in stage.weights)
            assert len(stage.outputs) == 1, "the residual stream is all that goes on"
    assert sum(len(stage.weights) for stage in stages) == len(graph.weights)


def test_gradients_do_not_depend_on_recomputing(graph: Graph, text: list[int]) -> None:
    stages = Stages(graph)
    gradients = []
    for recompute in (False, True):
        weights = {name: weight.read().clone().requires_grad_(True) for name, weight in graph.weights.items()}
        stages.hidden(torch.tensor([text[:40]]), weights, recompute=recompute).square().sum().backward()  # type: ignore[no-untyped-call]
        gradients.append({name: tensor.grad for name, tensor in weights.items()})
    plain, again = gradients
    for name, gradient in plain.items():
        assert gradient is not None and bool(gradient.abs().sum() > 0), name
        torch.testing.assert_close(again[name], gradient)


def test_only_score_graphs(traced: Graph) -> None:
    with pytest.raises(InvariantError, match="only a 'score' graph"):
        Stages(traced)
