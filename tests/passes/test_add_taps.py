"""Taps: they stand where they say, they outlive every fusion, they stop none, and they are what goes on being used."""

from __future__ import annotations

import dataclasses
import operator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import Dim

from tests.artifacts import CHUNK
from tests.case import Case, export, run_graph
from tests.conftest import WINDOW
from tests.faults.graph import LINEAR, Spoil, result
from tests.passes.test_huggingface import build
from tests.tolerances import FP32_LOGITS
from transom.errors import InvariantError
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten, is_call
from transom.graphs.node import Node
from transom.passes.add_taps import AddTaps
from transom.passes.canonicalize import Canonicalize
from transom.passes.fuse_norms import FuseNorms
from transom.passes.pipelines import PIPELINES, pipeline
from transom.zoo.model import Model

# The sites of a layer in the order in which they are computed, each with what computes it.
LAYER = {
    "input_layernorm": "norm",
    "self_attn.q_proj": "projection",
    "self_attn.q_norm": "norm",
    "self_attn.q_rope": "rope",
    "self_attn.k_proj": "projection",
    "self_attn.k_norm": "norm",
    "self_attn.k_rope": "rope",
    "self_attn.v_proj": "projection",
    "self_attn.attention": "attention",
    "self_attn.o_proj": "projection",
    "post_attention_layernorm": "norm",
    "residual.1": "residual",
    "pre_feedforward_layernorm": "norm",
    "mlp.activation": "activation",
    "mlp.down_proj": "projection",
    "post_feedforward_layernorm": "norm",
    "residual.2": "residual",
}
SITES = [
    ("tap.embed_tokens", None, "embedding"),
    *((f"tap.layers.{layer}.{name}", layer, op) for layer in range(6) for name, op in LAYER.items()),
    ("tap.norm", None, "norm"),
]


@pytest.fixture(scope="module")
def tapped(traced: Graph) -> Graph:
    return Case(graph=traced).run(AddTaps()).graph


def tap_nodes(graph: Graph) -> dict[str, Node]:
    """What the graph returns for every tap."""
    returned = [graph.outputs[tap.name] for tap in graph.taps]
    return {tap.name: node for tap, node in zip(graph.taps, returned, strict=True)}


def idle_taps(graph: Graph) -> list[str]:
    """Taps whose value the results do not depend on: a copy that the computation does not go on with."""
    results, used = list(graph.outputs.values())[: -len(graph.taps)], set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in used:
            used.add(node)
            stack.extend(node.all_input_nodes)
    idle = []
    for name, node in tap_nodes(graph).items():
        # A rotation may be tapped in one layout and used in the other; the last sum comes out of a norm's operation.
        source = node.args[0] if is_call(node, aten.transpose.int, operator.getitem) else node
        if source not in used:
            idle.append(name)
    return idle


def test_every_site_is_tapped_in_order(tapped: Graph, traced: Graph) -> None:
    assert [(tap.name, tap.layer, tap.op) for tap in tapped.taps] == SITES
    assert traced.taps == ()


def test_taps_stand_at_the_borders_of_their_operations(tapped: Graph, tiny: Model) -> None:
    nodes, config = tap_nodes(tapped), tiny.config
    N, K, H, D = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    shapes = {
        "self_attn.q_norm": (None, None, N, H),
        "self_attn.k_rope": (None, K, None, H),
        "self_attn.attention": (None, None, N * H),
        "mlp.activation": (None, None, config.intermediate_size),
        "residual.2": (None, None, D),
    }
    for name, expected in shapes.items():
        shape = nodes[f"tap.layers.3.{name}"].meta["val"].shape
        assert tuple(size if isinstance(size, int) else None for size in shape) == expected, name


def test_a_second_run_adds_nothing(tapped: Graph) -> None:
    case = Case(graph=tapped).run(AddTaps()).expect_changes(0)
    assert len(case.graph.taps) == len(SITES)


@pytest.mark.parametrize(("target", "quant"), [*((target, "none") for target in PIPELINES), ("onnxruntime", "int8")])
def test_taps_stop_no_fusion_and_outlive_all(target: str, quant: str, traced: Graph, tapped: Graph) -> None:
    without, with_taps = (
        Case(graph=graph).run(*pipeline(target, chunk=CHUNK, scheme=scheme(quant)).passes) for graph in (traced, tapped)
    )
    for bare, other in zip(without.records, with_taps.records, strict=True):
        # The head still computes the wanted rows alone, but the selection cannot move above the tap of the final norm.
        expected = 1 if bare.name == "SelectLogits" else bare.changes
        assert other.changes == expected, bare.name
        assert other.skipped == bare.skipped
    assert with_taps.graph.states == without.graph.states
    assert with_taps.graph.taps == tapped.taps
    assert len(set(tap_nodes(with_taps.graph).values())) == len(SITES)
    assert idle_taps(with_taps.graph) == []


def test_an_idle_tap_is_noticed(tapped: Graph) -> None:
    """The check above sees a tap that a pass has left behind on a copy."""
    graph = tapped.clone()
    node = tap_nodes(graph)["tap.layers.2.mlp.activation"]
    with graph.fx.inserting_after(node):
        copied = graph.call(node.target, node.args, node)
    for user in [user for user in node.users if user.op != "output"]:
        user.replace_input_with(node, copied)
    assert idle_taps(graph) == ["tap.layers.2.mlp.activation"]


@pytest.mark.parametrize("target", PIPELINES)
def test_numbers_stay_what_they_were(
    target: str, tapped: Graph, tiny: Model, text: list[int], text_logits: NDArray[np.float32]
) -> None:
    case = Case(graph=tapped, model=tiny).run(*pipeline(target, chunk=CHUNK, scheme=scheme("none")).passes)
    case.matches_eager(text, text_logits, chunk=CHUNK, lengths=(3 * WINDOW + 5,), decode=8)


class _Silent(nn.Module):
    """Norms without a module around them."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.weight, self.norms = nn.Parameter(torch.ones(8)), norms

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.norms):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return x


class _Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x)
        return output


def test_a_norm_is_tapped_where_its_module_is_named() -> None:
    graph = export(_Holder(_Silent(1)), torch.ones(2, 3, 8))
    case = Case(graph=graph).run(AddTaps())
    assert [(tap.name, tap.layer, tap.op) for tap in case.graph.taps] == [("tap.inner", None, "norm")]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_Silent(1), "no module path to name a tap after at test_add_taps.py"),
        (_Holder(_Silent(2)), "would be the tap 'inner'"),
    ],
)
def test_sites_that_cannot_be_named_are_an_error(module: nn.Module, message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        Case(graph=export(module, torch.ones(2, 3, 8))).run(AddTaps())


def test_fused_graphs_are_refused(traced: Graph) -> None:
    graph = Case(graph=traced).run(Canonicalize(), FuseNorms()).graph
    with pytest.raises(InvariantError, match="AddTaps must run first"):
        Case(graph=graph).run(AddTaps())


@pytest.mark.parametrize("target", PIPELINES)
def test_a_fault_shows_at_its_tap_and_not_before(target: str, tapped: Graph, text: list[int]) -> None:
    """After all passes, a tap says what the computation goes on with."""
    fault = Spoil(
        LINEAR, lambda graph, node: result(aten.add.Tensor, 0.25)(graph, node.args[0]), "layers.4.self_attn.o_proj"
    )
    passes = pipeline(target, chunk=CHUNK, scheme=scheme("none")).passes
    sessions = [Case(graph=tapped).run(*more, *passes).session(chunk=CHUNK) for more in ((), (fault,))]
    for session in sessions:
        session.prefill(text[:CHUNK])
    good, moved_on = (session.tapped for session in sessions)
    first = next(tap for tap in tapped.taps if not np.array_equal(good[tap.name], moved_on[tap.name]))
    assert first.name == "tap.layers.4.self_attn.attention"
    moved = moved_on[first.name] - good[first.name]
    assert np.abs(moved - 0.25).max() < FP32_LOGITS


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hugging_faces_module_has_the_same_sites(implementation: str) -> None:
    module = build(implementation)
    sizes = ({0: Dim("B", max=8), 1: Dim("T", max=512)},)
    graph = export(module, torch.zeros(2, 67, dtype=torch.int64), dynamic_shapes=sizes)
    case = Case(graph=graph).run(AddTaps())
    assert {(tap.name, tap.layer, tap.op) for tap in case.graph.taps} == set(SITES)
    tokens_BT = torch.randint(0, 99, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(tokens_BT)
    assert (run_graph(case.graph, tokens_BT)[0] - expected).abs().max() < FP32_LOGITS


def test_the_score_graph_is_tapped_too(scored: Graph) -> None:
    case = Case(graph=scored).run(AddTaps(), *pipeline("onnx", chunk=1, scheme=scheme("none")).passes)
    assert [(tap.name, tap.layer, tap.op) for tap in case.graph.taps] == SITES
    assert idle_taps(case.graph) == []
    case.expect({ops.ATTENTION: 6, ops.RMS_NORM: 37, ops.ROTARY: 12, ops.GATED: 6})


def test_taps_are_plain_data(tapped: Graph) -> None:
    assert dataclasses.asdict(tapped.taps[1]) == {"name": "tap.layers.0.input_layernorm", "layer": 0, "op": "norm"}
