"""The graph as a data structure."""

from __future__ import annotations

import torch
from torch import nn

from tests.case import export, run_graph
from transom.graphs.check import check
from transom.graphs.graph import Graph, refresh
from transom.graphs.match import aten, is_transpose, layer_path, source_line, split_scalar
from transom.graphs.weight import Weight


def test_clone_shares_weights_but_not_nodes(traced: Graph) -> None:
    before = traced.digest()
    copy = traced.clone()
    assert copy.digest() == before
    assert all(copy.weights[name] is weight for name, weight in traced.weights.items())
    assert not set(copy.fx.nodes) & set(traced.fx.nodes)
    for node in copy.calls(aten.linear.default):
        node.replace_all_uses_with(node.args[0])
    copy.add_weight("new", Weight.of(torch.zeros(3)))
    copy.weights.pop("norm.weight")
    copy.states = {}
    assert traced.digest() == before
    assert "new" not in traced.weights and "norm.weight" in traced.weights and traced.states
    check(traced)


def test_an_added_weight_is_an_input(scored: Graph) -> None:
    graph = scored.clone()
    node = graph.add_weight("extra.table", Weight.of(torch.ones(2, 3)))
    assert graph.add_weight("extra.table", Weight.of(torch.ones(2, 3))) is node
    assert graph.weight_of(node) == ("extra.table", graph.weights["extra.table"])
    check(graph)
    graph.drop_dead_code()
    assert "extra.table" not in graph.weights
    check(graph)
    assert graph.digest() == scored.digest()


def test_weight_bytes_count_a_shared_buffer_once() -> None:
    shared = nn.Linear(8, 8, bias=False)
    shared.weight.requires_grad_(False)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = shared, nn.Linear(8, 8, bias=False)
            self.second.weight = shared.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    graph = export(Tied(), torch.ones(1, 8))
    assert graph.weight_bytes() == 8 * 8 * 4


def test_tensors_that_only_start_at_one_address_are_not_tied() -> None:
    """A square matrix and its transposed view share address and shape, not numbers."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            matrix = torch.arange(9.0).view(3, 3)
            self.plain, self.turned = nn.Buffer(matrix), nn.Buffer(matrix.T)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.plain + (x @ self.turned) * 10

    module, x = Views(), torch.tensor([[1.0, 2.0, 3.0]])
    (output,) = run_graph(export(module, x), x)
    assert torch.equal(output, module(x))


def test_refresh_follows_changed_shapes(traced: Graph) -> None:
    graph = traced.clone()
    nodes = [graph.inputs[name] for name in graph.states]
    for node in nodes:
        node.meta["val"] = node.meta["val"][:, :, :9]
        node.meta["changed"] = True
    untouched = graph.calls(aten.embedding.default)[0].meta["val"]
    refresh(graph)
    for node in nodes:
        (write,) = [user for user in node.users if user.target is aten.index_copy.default]
        assert write.meta["val"].shape[2] == 9
        assert "changed" not in node.meta
    masked = graph.calls(aten.masked_fill.Scalar)[0]
    assert masked.meta["val"].shape[3] == 9
    assert graph.calls(aten.embedding.default)[0].meta["val"] is untouched, "what did not change is not run again"


def test_nodes_know_where_they_come_from(traced: Graph) -> None:
    path = "layers.4.mlp.down_proj"
    (down,) = [node for node in traced.calls(aten.linear.default) if layer_path(node) == path]
    assert source_line(down).startswith(("gemma3.py:", "linear.py:"))
    assert source_line(next(iter(traced.placeholders().values()))) == ""


def test_matching_helpers() -> None:
    class Parts(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.transpose(1, -1), x.permute(0, 2, 1), x.permute(1, 0, 2), 2.0 * x, torch.add(x, 3, alpha=2)

    graph = export(Parts(), torch.ones(1, 2, 3))
    last_two, permuted, first_two, doubled, scaled = graph.outputs.values()
    assert is_transpose(last_two, 1, 2) and is_transpose(permuted, 2, 1) and not is_transpose(first_two, 1, 2)
    assert is_transpose(first_two, 0, 1) and not is_transpose(doubled, 0, 1)
    (x,) = graph.inputs.values()
    assert split_scalar(doubled, aten.mul.Tensor) == (x, 2.0)
    assert split_scalar(scaled, aten.add.Tensor) is None, "alpha multiplies the number"
