"""Mixtures of experts are recognised as they are written, and left alone as soon as one step is another."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.case import Case, export, run_graph
from tests.tolerances import FP32_PRODUCT
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.fake_quantize import FAKE_QUANTIZE
from transom.graphs.graph import Graph
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fake_quantize import FakeQuantize
from transom.passes.fuse_experts import FuseExperts
from transom.zoo.experts import Experts, Gate, clamped_swiglu, gated, route

EXPERTS, WIDTH, HIDDEN = 4, 32, 16


class Mixture(nn.Module):
    def __init__(self, gate: Gate, *, biases: bool, normalized: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts(EXPERTS, WIDTH, HIDDEN, gate, biases=biases)
        self.normalized = normalized
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routed = route(self.router(x), 2, normalized=self.normalized)
        result: torch.Tensor = self.experts(x, *routed)
        return result


def traced(mixture: Mixture) -> Graph:
    sizes = ({0: Dim("B", min=1, max=8), 1: Dim("T", min=1, max=64)},)
    return export(mixture, torch.randn(2, 5, WIDTH), dynamic_shapes=sizes)


def differ(left: Graph, right: Graph, shape: tuple[int, int]) -> float:
    """Relative to the largest result."""
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    (first,), (second,) = run_graph(left, x), run_graph(right, x)
    return float((first - second).abs().max() / first.abs().max())


@pytest.mark.parametrize(
    ("gate", "biases", "normalized"),
    [
        (gated(nn.functional.silu), False, True),
        (gated(functools.partial(nn.functional.gelu, approximate="tanh")), False, False),
        (clamped_swiglu, True, True),
    ],
    ids=["silu", "gelu", "clamped"],
)
def test_a_mixture_is_one_operation(gate: Gate, biases: bool, normalized: bool) -> None:
    case = Case(graph=traced(Mixture(gate, biases=biases, normalized=normalized)))
    fused = case.run(Canonicalize(), FuseExperts()).expect({ops.EXPERTS: 1, torch.ops.aten.scatter.src: 0}).settled()
    for shape in ((1, 1), (3, 7)):
        assert differ(case.graph, fused.graph, shape) < FP32_PRODUCT
    converted = fused.run(ConvertQuantized(scheme("int8"))).expect({ops.EXPERTS_QUANTIZED: 1, ops.LINEAR_QUANTIZED: 0})
    # Nothing but the experts, of which 8 bits leave two digits.
    assert 0 < differ(case.graph, converted.graph, (2, 5)) < 0.05


def test_training_rounds_the_numbers_that_are_deployed() -> None:
    case = Case(graph=traced(Mixture(clamped_swiglu, biases=True)))
    rounded = case.run(FakeQuantize(scheme("int8"))).expect({FAKE_QUANTIZE: 2}).settled()
    deployed = case.run(Canonicalize(), FuseExperts(), ConvertQuantized(scheme("int8")))
    assert 0 < differ(rounded.graph, deployed.graph, (2, 5)) < FP32_PRODUCT < differ(case.graph, rounded.graph, (2, 5))


def _steeper(packed: torch.Tensor) -> torch.Tensor:
    gates, ups = packed.chunk(2, dim=-1)
    gates, ups = gates.clamp(max=7.0), ups.clamp(-7.0, 7.0)
    return (ups + 1) * (gates * torch.sigmoid(gates * 1.7))


def _up_first(packed: torch.Tensor) -> torch.Tensor:
    ups, gates = packed.chunk(2, dim=-1)
    return nn.functional.silu(gates) * ups


@pytest.mark.parametrize("gate", [_steeper, _up_first])
def test_another_mixture_is_left_as_it_is(gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = Case(graph=traced(Mixture(gate, biases=True))).run(Canonicalize(), FuseExperts())
    case.expect({ops.EXPERTS: 0}).expect_skipped("what reads the scattered shares is not known")
