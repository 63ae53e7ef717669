"""Bisection knows no family: faults of a Llama, whose norms, activation, head and masks are not Gemma's, are named."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from tests.case import Case
from tests.faults.families import FAMILY_FAULTS
from tests.faults.gemma4 import GEMMA4_FAULTS
from tests.faults.llama import LLAMA_FAULTS
from transom.backends.reference.session import ReferenceSession
from transom.backends.session import Session
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.passes.add_taps import AddTaps
from transom.validation.bisection.bisect import bisect
from transom.validation.bisection.context import Context
from transom.validation.bisection.divergence import compare
from transom.validation.bisection.eager import Eager
from transom.validation.bisection.mutations import ACTIVATIONS, called
from transom.validation.bisection.recording import Recording, plan_calls, record
from transom.zoo.model import Model, load

FAULTS = {**FAMILY_FAULTS, **GEMMA4_FAULTS}
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


@pytest.mark.parametrize("name", LLAMA_FAULTS)
def test_a_fault_of_a_llama_is_placed_and_named(name: str, context: Context, right: Recording) -> None:
    fault, layer, op, cause = LLAMA_FAULTS[name]
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


@pytest.mark.parametrize("name", ["gpt-oss-tiny", "gemma4-experts-tiny"])
def test_quantised_experts_are_compared_with_what_their_codes_mean(name: str) -> None:
    model = load(name)
    verdict = bisect("eager", "onnx@ConvertQuantized", model=model, quant="int8", chunk=CHUNK, length=30, decode=2)
    assert not verdict.diverged, verdict


@functools.cache
def tapped(name: str) -> tuple[Context, Recording]:
    """A tiny model as it is traced, over three windows, and what its taps are when nothing is wrong."""
    model = load(name)
    graph = Case(graph=model.trace()).run(AddTaps()).graph
    calls = plan_calls(window=model.config.longest_window or 8, chunk=CHUNK, decode=4)
    ids = torch.randint(0, model.config.vocab_size, (calls[-1].stop,), generator=torch.Generator().manual_seed(3))
    context = Context(graph=graph, tokens=ids.tolist())
    return context, record(ReferenceSession(graph, context=256, chunk=CHUNK), calls, context)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_family_is_placed_and_named(fault: str) -> None:
    name, spoil, layer, op, cause = FAULTS[fault]
    context, right = tapped(name)
    calls = plan_calls(window=load(name).config.longest_window or 8, chunk=CHUNK, decode=4)
    session = ReferenceSession(Case(graph=context.graph).run(spoil).graph, context=256, chunk=CHUNK)
    verdict = compare(right, record(session, calls, context), context)
    assert (verdict.diverged, verdict.layer, verdict.op, verdict.side) == (True, layer, op, "b"), verdict
    assert cause in verdict.cause


def test_the_module_of_gemma_4_agrees_with_its_graph() -> None:
    """Layers that read what others wrote are watched where they are called."""
    context, right = tapped("gemma4-tiny")
    eager = Session(Eager(load("gemma4-tiny"), context.graph, "none", context=256, chunk=CHUNK))
    recorded = record(eager, right.calls, context)
    assert list(recorded.values) == list(right.values) and not compare(recorded, right, context).diverged


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        (aten.gelu.default, {}), (aten.gelu.default, {"approximate": "tanh"}), (aten.silu.default, {}),
        (aten.relu.default, {}), (aten.sigmoid.default, {}),
    ],
    ids=str,
)  # fmt: skip
def test_an_activation_has_one_name(operation: Callable[..., torch.Tensor], options: dict[str, str]) -> None:
    """Else what is right is supposed once more, under another name, and may be told as the cause."""
    graph, x = torch.fx.Graph(), torch.arange(-3.0, 4.0)
    node = graph.call_function(operation, (graph.placeholder("x"),), {**options})
    assert torch.equal(ACTIVATIONS[called(node)](x), operation(x, **options))
