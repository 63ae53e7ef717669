"""What looks almost like a match and is none: the graph must not change, or keep its numbers where it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu

from tests.case import Case, export, run_graph
from tests.tolerances import FP32_ATTENTION
from transom.formats.schemes import scheme
from transom.graphs import ops
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.state import ring
from transom.passes.attend_before_writes import AttendBeforeWrites
from transom.passes.base import Pass
from transom.passes.bound_local_caches import BoundLocalCaches
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fold_constants import FoldConstants
from transom.passes.fuse_add_norms import FuseAddNorms
from transom.passes.fuse_attention import FuseAttention
from transom.passes.fuse_cache_writes import FuseCacheWrites
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.fuse_norms import FuseNorms
from transom.passes.fuse_rotary import FuseRotary
from transom.passes.pack_projections import PackProjections
from transom.passes.select_logits import SelectLogits
from transom.passes.share_embedding import ShareEmbedding
from transom.zoo.rope import rotate_interleaved

D = 64

Body = Callable[["Parts", torch.Tensor], torch.Tensor]


class Parts(nn.Module):
    """Weights that the bodies below use; every body sees an x of [2, 5, 64]."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.body = body
        self.weight = nn.Parameter(torch.randn(D, generator=noise))
        self.a, self.b = (nn.Parameter(torch.randn(D, D, generator=noise) / 8) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(D, generator=noise))
        self.scale_BTD = nn.Parameter(torch.randn(1, 1, D, generator=noise))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return nn.functional.linear(x, weight, bias)


def rms(x: torch.Tensor, axis: int = -1, power: int = 2) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(power).mean(axis, keepdim=True) + 4.0)


def heads(x: torch.Tensor) -> torch.Tensor:
    """[B, N, T, H] = [2, 4, 5, 16]."""
    return x.view(2, 5, 4, 16).transpose(1, 2)


def angles(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    turns = torch.arange(5)[:, None] * torch.linspace(1, 0.1, width)
    return turns.cos(), turns.sin()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def turn_backwards(x: torch.Tensor) -> torch.Tensor:
    (low, high), (cos, sin) = heads(x).chunk(2, dim=-1), angles(8)
    return torch.cat((low * cos + high * sin, high * cos - low * sin), dim=-1)


def turn_swapped(x: torch.Tensor) -> torch.Tensor:
    (low, high), (cos, sin) = heads(x).chunk(2, dim=-1), angles(8)
    return torch.cat((high * cos - low * sin, low * cos + high * sin), dim=-1)


def turn_interleaved(x: torch.Tensor) -> torch.Tensor:
    low, high = heads(x)[..., 0::2], heads(x)[..., 1::2]
    cos, sin = angles(8)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def turn_neighbours(x: torch.Tensor) -> torch.Tensor:
    return rotate_interleaved(heads(x), *angles(8))


def turn_halves_to_neighbours(x: torch.Tensor) -> torch.Tensor:
    (low, high), (cos, sin) = heads(x).chunk(2, dim=-1), angles(8)
    return torch.stack((low * cos - high * sin, high * cos + low * sin), dim=-1).flatten(-2)


def turn_tokens(x: torch.Tensor) -> torch.Tensor:
    """Neighbours of another axis."""
    cos, sin = (table[:2] for table in angles(16))
    low, high = heads(x).view(2, 2, 2, 5, 16)[..., :2, :].unbind(1)
    return torch.stack((low * cos - high * sin, high * cos + low * sin), dim=-1).flatten(-2)


def turn_part(x: torch.Tensor) -> torch.Tensor:
    """Two of four quarters turn."""
    (low, high, *rest), (cos, sin) = heads(x).chunk(4, dim=-1), angles(4)
    return torch.cat((torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1), *rest), dim=-1)


def turn_uneven(x: torch.Tensor) -> torch.Tensor:
    cos, sin = angles(8)
    low, high, _ = torch.split(heads(x), [8, 8, 0], dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def gated(x: torch.Tensor, parts: Parts, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return act(linear(x, parts.a)) * linear(x, parts.b)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, approximate="tanh")


# Body, passes to run before, the pass, the operation that it makes, and how often.
SITES: list[tuple[str, Body, list[Pass], Pass, object, int]] = [
    ("rms norm", lambda m, x: rms(x) * m.weight, [], FuseNorms(), ops.RMS_NORM, 1),
    ("rms norm, 1 + w", lambda m, x: (1 + m.weight) * rms(x), [], FuseNorms(), ops.RMS_NORM, 1),
    ("rms norm over tokens", lambda m, x: rms(x, axis=1) * m.weight, [], FuseNorms(), ops.RMS_NORM, 0),
    ("mean of cubes", lambda m, x: rms(x, power=4) * m.weight, [], FuseNorms(), ops.RMS_NORM, 0),
    ("norm without a weight", lambda m, x: rms(x) * 3.0, [], FuseNorms(), ops.RMS_NORM, 1),
    ("norm scaled by a value", lambda m, x: rms(x) * x, [], FuseNorms(), ops.RMS_NORM, 1),
    ("norm of something else", lambda m, x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 4.0) * m.weight,
     [], FuseNorms(), ops.RMS_NORM, 0),
    ("norm scaled by alpha", lambda m, x: rms(x) * torch.add(m.weight, 1, alpha=3), [], FuseNorms(), ops.RMS_NORM, 1),
    ("norm of eps times alpha", lambda m, x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1, alpha=4))
     * m.weight, [], FuseNorms(), ops.RMS_NORM, 0),
    ("norm with a matrix", lambda m, x: rms(x[:, :1]) * m.a, [], FuseNorms(), ops.RMS_NORM, 1),
    ("rotation", lambda m, x: turn(heads(x), *angles(8)), [], FuseRotary(), ops.ROTARY, 1),
    ("rotation backwards", lambda m, x: turn_backwards(x), [], FuseRotary(), ops.ROTARY, 0),
    ("rotation of swapped halves", lambda m, x: turn_swapped(x), [], FuseRotary(), ops.ROTARY, 0),
    ("interleaved rotation", lambda m, x: turn_interleaved(x), [], FuseRotary(), ops.ROTARY, 0),
    ("rotation of neighbours", lambda m, x: turn_neighbours(x), [], FuseRotary(), ops.ROTARY, 1),
    ("rotation of halves into neighbours", lambda m, x: turn_halves_to_neighbours(x), [], FuseRotary(), ops.ROTARY, 0),
    ("rotation of other neighbours", lambda m, x: turn_tokens(x), [], FuseRotary(), ops.ROTARY, 0),
    ("partial rotation", lambda m, x: turn_part(x), [], FuseRotary(), ops.ROTARY, 0),
    ("rotation of three pieces", lambda m, x: turn_uneven(x), [], FuseRotary(), ops.ROTARY, 0),
    ("one angle for all", lambda m, x: turn(heads(x), *(t[:, :1] for t in angles(8))), [], FuseRotary(), ops.ROTARY, 0),
    ("rotation by position only once",
     lambda m, x: turn(heads(x), *(t[2:3] for t in angles(8))), [], FuseRotary(), ops.ROTARY, 0),
    ("gated gelu", lambda m, x: gated(x, m, tanh_gelu), [], FuseGatedMLP(), ops.GATED, 1),
    ("exact gelu", lambda m, x: gated(x, m, gelu), [], FuseGatedMLP(), ops.GATED, 1),
    ("silu", lambda m, x: gated(x, m, silu), [], FuseGatedMLP(), ops.GATED, 1),
    ("up before gate", lambda m, x: linear(x, m.b) * silu(linear(x, m.a)), [], FuseGatedMLP(), ops.GATED, 1),
    ("another activation", lambda m, x: gated(x, m, torch.tanh), [], FuseGatedMLP(), ops.GATED, 0),
    ("gate and up of two inputs", lambda m, x: tanh_gelu(linear(x, m.a)) * linear(x + 1, m.b), [], FuseGatedMLP(),
     ops.GATED, 0),
    ("gate with a bias", lambda m, x: tanh_gelu(linear(x, m.a, m.bias)) * linear(x, m.b), [], FuseGatedMLP(),
     ops.GATED, 0),
    ("two projections", lambda m, x: linear(x, m.a) - linear(x, m.b), [], PackProjections(),
     aten.split_with_sizes.default, 1),
    ("projections of two inputs", lambda m, x: linear(x, m.a) - linear(x + 1, m.b), [], PackProjections(),
     aten.split_with_sizes.default, 0),
    ("projections with a bias", lambda m, x: linear(x, m.a, m.bias) - linear(x, m.b, m.bias), [], PackProjections(),
     aten.split_with_sizes.default, 0),
    ("a weight used twice", lambda m, x: linear(x, m.a) - linear(linear(x, m.b), m.b), [], PackProjections(),
     aten.split_with_sizes.default, 0),
    ("add and norm", lambda m, x: rms(x + linear(x, m.a)) * m.weight, [FuseNorms()], FuseAddNorms(),
     ops.ADD_RMS_NORM, 1),
    ("broadcasting add and norm", lambda m, x: rms(x + m.bias) * m.weight, [FuseNorms()], FuseAddNorms(),
     ops.ADD_RMS_NORM, 0),
    ("add of a number and norm", lambda m, x: rms(x + 1.5) * m.weight, [FuseNorms()], FuseAddNorms(),
     ops.ADD_RMS_NORM, 0),
    ("scaled add and norm", lambda m, x: rms(torch.add(x, x * x, alpha=2)) * m.weight, [FuseNorms()], FuseAddNorms(),
     ops.ADD_RMS_NORM, 0),
    ("selection behind a head", lambda m, x: linear(x, m.a).index_select(1, torch.tensor([1, 4])), [], SelectLogits(),
     aten.linear.default, 1),
]  # fmt: skip


@pytest.mark.parametrize(("body", "before", "current", "operation", "count"), [s[1:] for s in SITES],
                         ids=[s[0] for s in SITES])  # fmt: skip
def test_a_hand_made_site(body: Body, before: list[Pass], current: Pass, operation: object, count: int) -> None:
    module, x = Parts(body), torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
    start = Case(graph=export(module, x)).run(Canonicalize(), *before)
    case = start.run(current).expect({operation: count}).settled()
    if not count:
        case.expect_changes(0)
    (output,) = run_graph(case.graph, x)
    torch.testing.assert_close(output, module(x).detach(), atol=FP32_ATTENTION, rtol=0)


def select(body: Body) -> Body:
    return lambda m, x: body(m, x).index_select(1, torch.tensor([1, 4]))


@pytest.mark.parametrize(
    ("body", "moves"),
    [
        (select(lambda m, x: linear(torch.tanh(x * 2 + 1), m.a)), 4),
        (select(lambda m, x: x * m.scale_BTD), 1),
        (select(lambda m, x: x + m.bias), 1),
        (select(lambda m, x: x + x[:, :1]), 1),
        (select(lambda m, x: x.softmax(1)), 0),
        (select(lambda m, x: x.cumsum(1)), 0),
        (select(lambda m, x: linear(x.transpose(1, 2)[:, :5, :5], m.a[:, :5])), 1),
        (lambda m, x: (y := linear(x, m.a)).index_select(1, torch.tensor([1])) + y.mean(), 0),
        (lambda m, x: linear(x, m.a).index_select(2, torch.tensor([1])), 0),
    ],
)
def test_selecting_positions_early_keeps_the_numbers(body: Body, moves: int) -> None:
    """Also where an operand has one position for all: it cannot be selected from."""
    module, x = Parts(body), torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
    case = Case(graph=export(module, x)).run(Canonicalize(), SelectLogits())
    assert case.records[-1].changes <= moves
    torch.testing.assert_close(run_graph(case.graph, x)[0], module(x).detach(), atol=FP32_ATTENTION, rtol=0)


def test_canonicalize_keeps_the_changes_that_change_something() -> None:
    class Casts(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            same, other = x.float(), x.double()
            first, second, third = torch.chunk(x, 3, dim=-1)
            return (
                same.clone() + 1,
                other,
                first - second[..., :1],
                third.contiguous() + other.float()[..., :1],
            )

    x = torch.randn(2, 3, 8)
    case = Case(graph=export(Casts(), x)).run(Canonicalize())
    assert len(case.graph.calls(aten.to.dtype, aten._to_copy.default)) == 2
    case.expect({aten.clone.default: 0, aten.contiguous.default: 0, aten.chunk.default: 0}).settled()
    for actual, expected in zip(run_graph(case.graph, x), Casts()(x), strict=True):
        assert torch.equal(actual, expected)


def test_fold_constants_leaves_what_is_no_constant() -> None:
    class Constants(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            grown = torch.arange(x.shape[0])
            return x + torch.arange(4) ** 2, torch.rand(4) + x, grown * 2, torch.arange(300_000) + x[:1, :1]

    x, rows = torch.zeros(3, 4), torch.export.Dim("R", min=2, max=9)
    case = Case(graph=export(Constants(), x, dynamic_shapes=({0: rows},))).run(FoldConstants())
    case.expect_changes(1).expect({aten.rand.default: 1, aten.pow.Tensor_Scalar: 0}).settled()
    assert len(case.graph.calls(aten.arange.default)) == 2, "a dynamic one, and one of 2.4 MB"
    assert run_graph(case.graph, x)[0].tolist() == [[0, 1, 4, 9]] * 3


def test_sharing_needs_one_recipe(tiny_case: Case) -> None:
    tiny_case.run(ShareEmbedding()).expect_changes(0)


@pytest.fixture(scope="module")
def tiny_case(scored: Graph) -> Case:
    return Case(graph=scored)


def test_a_score_graph_has_no_caches_to_fuse(tiny_case: Case) -> None:
    fused = tiny_case.run(Canonicalize(), FuseAttention(), FuseCacheWrites(), BoundLocalCaches(4))
    fused.expect_changes(fused.records[0].changes, 6, 0, 0)
    fused.run(AttendBeforeWrites()).expect_changes(0).expect_skipped(*["do not come from a cache"] * 6)
    tiny_case.run(Canonicalize(), ConvertQuantized(scheme("none"))).expect_changes(
        tiny_case.run(Canonicalize()).records[0].changes, 0
    )


class Writes(nn.Module):
    """Ways to put new keys into a cache."""

    def __init__(self, place: Callable[[torch.Tensor, int], torch.Tensor], axis: int = 2) -> None:
        super().__init__()
        self.place, self.axis = place, axis

    def forward(self, new: torch.Tensor, start: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        positions = start + torch.arange(new.shape[self.axis])
        return cache.index_copy(self.axis, self.place(positions, cache.shape[self.axis]), new)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("module", "reasons"),
    [
        (Writes(lambda positions, slots: positions % slots), []),
        (Writes(lambda positions, slots: positions), ["position p into slot p % S"]),
        (Writes(lambda positions, slots: (positions + 1) % slots), ["position p into slot p % S"]),
        (Writes(lambda positions, slots: positions % 40), ["position p into slot p % S"]),
        (Writes(lambda positions, slots: positions.clamp(max=slots - 1)), ["position p into slot p % S"]),
        (Writes(lambda positions, slots: positions % slots, axis=3), ["axis 3"]),
    ],
    ids=["ring", "no ring", "shifted", "other width", "stuck at the end", "other axis"],
)
def test_writes_into_a_cache(module: Writes, reasons: list[str], dynamic: bool) -> None:
    axis = module.axis
    new, cache = torch.randn(1, 2, 3, 3), torch.zeros(1, 2, 3, 41)
    if axis == 2:
        new, cache = torch.randn(1, 2, 3, 8), torch.zeros(1, 2, 41, 8)
    sizes = ({axis: torch.export.Dim("T", max=512)}, None, {axis: torch.export.Dim("S", max=512)}) if dynamic else None
    graph = export(module, new, torch.tensor(0), cache, dynamic_shapes=sizes)
    name = "cache.0.key"
    graph.input_names, graph.output_names = ("new", "start", name), (name,)
    shape = tuple(size if isinstance(size, int) else None for size in graph.inputs[name].meta["val"].shape)
    state = ring(name, layer=0, heads=2, width=8, dtype="float32")
    graph.states = {name: dataclasses.replace(state, sizes=shape)}
    case = Case(graph=graph).run(Canonicalize(), FuseCacheWrites()).expect_skipped(*reasons)
    case.expect({ops.WRITE_CACHE: 0 if reasons else 1}).settled()


def test_a_cache_with_an_unknown_reader_still_grows(traced: Graph) -> None:
    """Somebody sums the keys of layer 0: its cache must not be cut, and the report says so."""
    case = Case(graph=traced).run(Canonicalize(), FuseAttention(), FuseCacheWrites())
    graph = case.graph.clone()
    write = graph.calls(ops.WRITE_CACHE)[0]
    logits = graph.outputs["logits"]
    with graph.fx.inserting_before(graph.output):
        total = graph.call(aten.sum.default, (write,), write)
        other = graph.call(aten.add.Tensor, (logits, total), write)
    graph.output.replace_input_with(logits, other)
    graph.settle_outputs()
    bounded = (
        Case(graph=graph)
        .run(BoundLocalCaches(4))
        .expect_changes(6)
        .expect_skipped("cache.0.key: not every reader is", "cache.0.value: not every reader of the cache beside it is")
    )
    assert [state.slots for state in bounded.graph.states.values()][:4] == [None, None, 19, 19]
    bounded.settled()
