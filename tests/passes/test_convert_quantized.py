"""Block quantisation: the layout, the rounding, the codes that a checkpoint brought, and who shares them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from tests.artifacts import CHUNK
from tests.case import Case, export, run_graph
from tests.tolerances import FP8_WEIGHTS, FP32_ATTENTION, FP32_LOGITS
from transom.graphs import ops
from transom.graphs.errors import QuantizationError
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.quantized import dequantize, pack, unpack
from transom.graphs.rounding import round_rows
from transom.graphs.schemes import BITS, SCHEMES, SPECS, QuantSpec, scheme
from transom.graphs.weight import Lattice, Weight
from transom.passes.base import Pipeline
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.pack_projections import PackProjections
from transom.passes.pipelines import pipeline
from transom.zoo.model import Model

FORMATS = [
    *(
        QuantSpec(number=number, block=32, symmetric=symmetric)
        for number in ("int4", "int8")
        for symmetric in (True, False)
    ),
    QuantSpec(number="int4", block=32, signed_scale=True, scale_dtype="float16"),
    QuantSpec(number="int4", block="row"),
    QuantSpec(number="int8", block=64),
]
INT8 = scheme("int8")
INT8_BLOCK32, ASYMMETRIC = SPECS["int8_block32"], QuantSpec(number="int4", block=32, symmetric=False)

formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(rows: torch.Tensor, fmt: QuantSpec) -> torch.Tensor:
    """Quantised, packed, and back."""
    found = round_rows(rows, fmt)
    packed = None if found.zero_points is None else pack(found.zero_points, fmt.number)
    return dequantize(pack(found.codes, fmt.number), found.scales, packed, fmt.number)


@given(number=st.sampled_from(["int4", "int8"]), count=st.integers(1, 33), rows=st.integers(1, 4), seed=seeds)
def test_packing_can_be_undone(number: str, count: int, rows: int, seed: int) -> None:
    bits = BITS[number]
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, number)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack(packed, number, count), codes)
    if bits == 4 and count > 1:
        assert torch.equal(packed[:, 0] & 15, codes[:, 0]), "the even column stands in the low half"


@given(fmt=formats, seed=seeds, height=st.integers(2, 9))
def test_a_row_is_rounded_by_itself(fmt: QuantSpec, seed: int, height: int) -> None:
    rows = normal(seed, height, 64)
    alone = torch.cat([rounded(row[None], fmt) for row in rows])
    assert torch.equal(rounded(rows, fmt), alone)


class Linears(nn.Module):
    def __init__(self, columns: int = 64, rows: int = 5000) -> None:
        super().__init__()
        self.first = nn.Linear(columns, rows, bias=False)
        self.second = nn.Linear(columns, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)[..., :8] + self.second(x)  # type: ignore[no-any-return]


def linears(**sizes: int) -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    module = Linears(**sizes)
    x = normal(1, 2, module.first.in_features)
    return export(module, x), x


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_linears_become_codes(name: str) -> None:
    graph, x = linears()
    case = Case(graph=graph).run(Canonicalize(), ConvertQuantized(scheme(name)))
    case.expect({ops.LINEAR_QUANTIZED: 1, aten.linear.default: 1}).expect_skipped("linears with a bias")
    case.settled()
    weight = graph.weights["first.weight"].read()
    fmt = scheme(name).of("first.weight")
    assert fmt is not None
    expected = x @ rounded(weight, fmt).T[:, :8] + x @ graph.weights["second.weight"].read().T
    expected += graph.weights["second.bias"].read()
    torch.testing.assert_close(run_graph(case.graph, x)[0], expected, atol=FP32_ATTENTION, rtol=0)
    held = {key: value for key, value in case.graph.weights.items() if key.startswith("first")}
    assert sum(weight.bytes for weight in held.values()) == fmt.bytes(5000, 64)


@settings(max_examples=30)
@given(data=st.data())
def test_codes_do_not_depend_on_how_rows_are_asked_for(data: st.DataObject) -> None:
    codes = QUANTIZED.weights["first.weight.codes"]
    whole = WHOLE_CODES
    start = data.draw(st.integers(0, 4999))
    stop = data.draw(st.integers(start + 1, 5000))
    assert torch.equal(codes.read_rows(start, stop), whole[start:stop])


QUANTIZED = Pipeline([ConvertQuantized(scheme("int4"))]).run(linears()[0])[0]
WHOLE_CODES = QUANTIZED.weights["first.weight.codes"].read()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused_when_read(bad: float) -> None:
    graph, _ = linears()
    weight = graph.weights["first.weight"].read().clone()
    weight[4321, 7] = bad
    graph.weights["first.weight"] = Weight.of(weight)
    quantized, _ = Pipeline([ConvertQuantized(INT8)]).run(graph)
    quantized.weights["first.weight.codes"].read_rows(0, 2048)
    with pytest.raises(QuantizationError, match=r"first\.weight holds NaN or infinity in rows 4096 to 5000"):
        quantized.weights["first.weight.codes"].read()


def test_columns_that_blocks_do_not_divide_are_refused() -> None:
    graph, _ = linears(columns=40, rows=8)
    with pytest.raises(QuantizationError, match=r"first\.weight: 40 columns cannot be cut into blocks of 16"):
        Pipeline([ConvertQuantized(INT8)]).run(graph)


def lattice_weight(rows: int, columns: int, bad: float | None = None) -> tuple[Weight, torch.Tensor, torch.Tensor]:
    codes = torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    scales = normal(4, rows, columns // 32).abs() / 100
    if bad is not None:
        scales[-1, -1] = bad
    numbers = codes * scales.repeat_interleave(32, 1)
    weight = Weight(
        shape=(rows, columns),
        dtype=torch.float32,
        read_rows=lambda start, stop: numbers[start:stop],
        origin="codes",
        lattice=Lattice(
            name="codes",
            number="int8",
            bits=8,
            block=32,
            symmetric=True,
            read_rows=lambda start, stop: (codes[start:stop], scales[start:stop], None),
        ),
    )
    return weight, codes, scales


def test_codes_of_the_checkpoint_are_kept() -> None:
    """Also through packing, and although rounding again would choose other scales."""
    graph, _ = linears()
    weight, codes, scales = lattice_weight(5000, 64)
    graph.weights["first.weight"] = Weight.concat([weight]).to(torch.float32)
    quantized, _ = Pipeline([ConvertQuantized(INT8)]).run(graph)
    found = quantized.weights["first.weight.codes"].read()
    assert torch.equal(found.view(5000, 64).to(torch.int16) - 128, codes.to(torch.int16))
    assert torch.equal(quantized.weights["first.weight.scales"].read(), scales)
    assert not torch.equal(round_rows(weight.read(), INT8_BLOCK32).scales, scales)


def test_codes_on_another_grid_are_rounded() -> None:
    graph, _ = linears()
    weight, _, _ = lattice_weight(5000, 64)
    graph.weights["first.weight"] = weight
    quantized, _ = Pipeline([ConvertQuantized(scheme("int4"))]).run(graph)
    codes, scales, zeros = (
        quantized.weights[f"first.weight.{key}"].read() for key in ("codes", "scales", "zero_points")
    )
    assert torch.equal(dequantize(codes, scales, zeros, "int4"), rounded(weight.read(), ASYMMETRIC))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_of_the_checkpoint_must_be_numbers(bad: float) -> None:
    graph, _ = linears()
    graph.weights["first.weight"], _, _ = lattice_weight(5000, 64, bad)
    quantized, _ = Pipeline([ConvertQuantized(INT8)]).run(graph)
    with pytest.raises(QuantizationError, match=r"first\.weight"):
        quantized.weights["first.weight.codes"].read()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_embedding_and_head_read_one_set_of_codes(name: str, scored: Graph, tiny: Model, text: list[int]) -> None:
    case = Case(graph=scored, model=tiny).run(
        Canonicalize(), FuseGatedMLP(), PackProjections(), ConvertQuantized(scheme(name))
    )
    case.expect({ops.LINEAR_QUANTIZED: 25, ops.EMBEDDING_QUANTIZED: 1, aten.linear.default: 0}).settled()
    (embedding,) = case.graph.calls(ops.EMBEDDING_QUANTIZED)
    head = case.graph.calls(ops.LINEAR_QUANTIZED)[-1]
    assert embedding.args[1:] == head.args[1:]
    assert head.args[4] == "int8", "the head keeps eight bits"
    assert "embed_tokens.weight" not in case.graph.weights
    # The numbers are those of the plain module with rounded weights.
    module = tiny.eager()
    for key, parameter in module.named_parameters():
        fmt = SCHEMES[name].of(key)
        if parameter.dim() == 2 and fmt is not None:
            parameter.data = rounded(parameter.data, fmt)
    tokens_BT = torch.tensor([text])
    with torch.no_grad():
        expected, _ = module(tokens_BT, torch.tensor(0), None)
    torch.testing.assert_close(run_graph(case.graph, tokens_BT)[0], expected, atol=FP32_LOGITS, rtol=0)


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(QuantizationError, match="'int3': choose one of none, int8, int4, int4_table, fp8"):
        scheme("int3")


def test_nothing_is_quantised_by_none(scored: Graph) -> None:
    Case(graph=scored).run(ConvertQuantized(scheme("none"))).expect_changes(0)
    assert scheme("none").specs == ()


def test_a_graph_with_8_bit_floats(tiny: Model, text: list[int], text_logits: NDArray[np.float32]) -> None:
    case = Case.of(tiny).run(*pipeline("xla", chunk=CHUNK, scheme=scheme("fp8")).passes)
    assert {weight.dtype for name, weight in case.graph.weights.items() if name.endswith("_proj.weight.codes")} == {
        torch.float8_e4m3fn
    }
    found = case.session(chunk=CHUNK).logits(text)
    assert 0 < np.sqrt(np.square(found - text_logits).mean()) < FP8_WEIGHTS
