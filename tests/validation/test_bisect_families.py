"""Bisection knows no family: faults of a Llama, whose norms, activation, head and masks are not Gemma's, are named."""

from __future__ import annotations

import pytest
import torch

from tests.case import Case
from tests.validation.faults import Edit, Spoil, result, weight
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.formats.schemes import SPECS
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.passes.add_taps import AddTaps
from transom.passes.base import Pass
from transom.validation.bisection.bisect import bisect
from transom.validation.bisection.context import Context, rounded
from transom.validation.bisection.divergence import compare
from transom.validation.bisection.eager import Eager
from transom.validation.bisection.recording import Recording, plan_calls, record
from transom.zoo.model import Model, load

LINEAR = aten.linear.default
CHUNK = 21
CALLS = plan_calls(window=8, chunk=CHUNK, decode=4)
TOTAL = CALLS[-1].stop


@pytest.fixture(scope="module")
def llama() -> Model:
    """llama3-tiny: three global layers, scaled rotations, norms without a one, silu, a head of its own."""
    return load("llama3-tiny")


@pytest.fixture(scope="module")
def context(llama: Model) -> Context:
    graph = Case(graph=llama.trace()).run(AddTaps()).graph
    ids = torch.randint(0, llama.config.vocab_size, (TOTAL,), generator=torch.Generator().manual_seed(3))
    return Context(graph=graph, tokens=ids.tolist())


def run(graph: Graph, context: Context) -> Recording:
    return record(ReferenceSession(graph, context=256, chunk=CHUNK), CALLS, context)


@pytest.fixture(scope="module")
def right(context: Context) -> Recording:
    return run(context.graph, context)


def number(old: float, new: float) -> Edit:
    """Another number where a given one stands."""

    def edit(_: Graph, node: Node) -> None:
        for index, value in enumerate(node.args):
            if isinstance(value, float) and abs(value - old) < 1e-9 + 1e-6 * abs(old):
                node.update_arg(index, new)

    return edit


def _gelu(graph: Graph, node: Node) -> None:
    with graph.fx.inserting_after(node):
        other = graph.call(aten.gelu.default, node.args, node)
    node.replace_all_uses_with(other)


def _other_norm(graph: Graph, node: Node) -> None:
    if node.args[1].meta["val"].dim() == 1:
        names = {name: placeholder for placeholder, name in graph.weight_names().items()}
        node.update_arg(1, graph.placeholders()[names["layers.2.input_layernorm.weight"]])


def _keys_for_values(graph: Graph, node: Node) -> None:
    names = {name: placeholder for placeholder, name in graph.weight_names().items()}
    node.update_arg(1, graph.placeholders()[names["layers.1.self_attn.k_proj.weight"]])


def _near(graph: Graph, node: Node) -> None:
    """Also hide what is 8 or more keys back."""
    hidden = node.args[1]
    keys, positions = graph.calls(aten.le.Tensor)[0].args
    with graph.fx.inserting_before(node):
        ages = graph.call(aten.sub.Tensor, (positions, keys), node)
        far = graph.call(aten.ge.Scalar, (ages, 8), node)
        both = graph.call(aten.bitwise_or.Tensor, (hidden, far), node)
    node.update_arg(1, both)


def spoil(target: object, edit: Edit, *paths: str) -> Pass:
    return Spoil(target, edit, *paths)


INT8 = weight(lambda rows: rounded(rows, SPECS["int8_block32"]))

FAULTS: dict[str, tuple[Pass, int | None, str, str]] = {
    "another epsilon": (
        spoil(aten.add.Tensor, number(1e-6, 1e-3), "layers.1.input_layernorm"),
        1, "norm", "the norm's epsilon is 0.001 in place of 1e-06",
    ),
    "another norm's weight": (
        spoil(aten.mul.Tensor, _other_norm, "layers.0.post_attention_layernorm"),
        0, "norm", "the norm has the weight of layers.2.input_layernorm",
    ),
    "another base": (
        spoil(aten.pow.Scalar, number(1e4, 5e5), ""), 0, "rope", "the RoPE base is 500000 in place of 10000",
    ),
    "a base that no list has": (
        spoil(aten.pow.Scalar, number(1e4, 23_450.0), ""), 0, "rope", "the RoPE base is 2.345e+04 in place of 1e+04",
    ),
    "an activation": (
        spoil(aten.silu.default, _gelu, "layers.1.mlp"), 1, "activation", "the exact gelu in place of silu",
    ),
    "a window in a global layer": (
        spoil(aten.masked_fill.Scalar, _near, "layers.2.self_attn"),
        2, "mask", "the global layer is bounded to a window of 8 keys",
    ),
    "scores without a scale": (
        spoil(aten.mul.Tensor, number(32**-0.5, 1.0), "layers.0.self_attn"),
        0, "softmax", "the scores are not scaled",
    ),
    "the keys' weights for values": (
        spoil(LINEAR, _keys_for_values, "layers.1.self_attn.v_proj"),
        1, "projection", "the weights are those of layers.1.self_attn.k_proj",
    ),
    "a quantised head": (
        spoil(LINEAR, INT8, ""), None, "quantisation", "the head is rounded to 8 bits in blocks of 32",
    ),
    "a projection in bfloat16": (
        spoil(LINEAR, weight(lambda rows: rows.bfloat16().float()), "layers.1.self_attn.k_proj"),
        1, "quantisation", "the weights are rounded to bfloat16",
    ),
    "a factor": (
        spoil(LINEAR, result(aten.mul.Tensor, 1.5), "layers.2.mlp.down_proj"),
        2, "projection", "the output is multiplied by 1.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_llama_is_placed_and_named(name: str, context: Context, right: Recording) -> None:
    fault, layer, op, cause = FAULTS[name]
    verdict = compare(right, run(Case(graph=context.graph).run(fault).graph, context), context)
    assert (verdict.diverged, verdict.layer, verdict.op, verdict.side) == (True, layer, op, "b"), verdict
    assert cause in verdict.cause


def test_the_module_of_a_llama_agrees_with_its_graph(llama: Model, context: Context, right: Recording) -> None:
    eager = record(Session(Eager(llama, context.graph, "none", context=256, chunk=CHUNK)), CALLS, context)
    assert list(eager.values) == list(right.values)
    assert not compare(eager, right, context).diverged


def test_a_quantised_llama_is_compared_with_what_its_codes_mean(llama: Model) -> None:
    verdict = bisect("eager", "onnx@ConvertQuantized", model=llama, quant="int8", chunk=CHUNK, length=30, decode=2)
    assert not verdict.diverged, verdict
