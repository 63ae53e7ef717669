"""Block quantisation: the layout, the rounding, the codes that a checkpoint brought, and who shares them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence

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
from tests.zoo.tiny_gguf import TINY, write_gguf
from transom.errors import QuantizationError
from transom.formats import float4, sfp8
from transom.formats.quantized import dequantize, pack, unpack
from transom.formats.rounding import round_rows
from transom.formats.schemes import BITS, MXFP4, SCHEMES, SPECS, Format, QuantSpec, Scheme, scheme
from transom.graphs import ops
from transom.graphs.encoded import Encoded
from transom.graphs.graph import Graph
from transom.graphs.match import aten
from transom.graphs.node import Node
from transom.graphs.weight import Weight
from transom.passes.base import PassRecord, Pipeline, rewrites
from transom.passes.canonicalize import Canonicalize
from transom.passes.conversion import Conversion, can_hold
from transom.passes.convert_quantized import Converted, ConvertQuantized, dequantized
from transom.passes.fuse_gated_mlp import FuseGatedMLP
from transom.passes.pack_projections import PackProjections
from transom.passes.pipelines import pipeline
from transom.passes.targets import TARGETS
from transom.zoo.checkpoints.random import random_weights
from transom.zoo.model import Model, load

FORMATS = [
    *(
        QuantSpec(format=format, block=32, symmetric=symmetric)
        for format in ("int4", "int8")
        for symmetric in (True, False)
    ),
    QuantSpec(format="int4", block=32, signed_scale=True, scale_dtype="float16"),
    QuantSpec(format="int4", block="row"),
    QuantSpec(format="int8", block=64),
]
INT8 = scheme("int8")
INT8_BLOCK32, ASYMMETRIC = SPECS["int8_block32"], QuantSpec(format="int4", block=32, symmetric=False)

formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**31)


def conversions(records: Sequence[PassRecord]) -> tuple[Conversion, ...]:
    """What became of every weight."""
    (converted,) = rewrites(records, Converted)
    return converted.conversions


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(rows: torch.Tensor, fmt: QuantSpec) -> torch.Tensor:
    """Quantised, packed, and back."""
    grid = round_rows(rows, fmt)
    packed = None if grid.zero_points is None else pack(grid.zero_points, fmt.format)
    return dequantize(pack(grid.codes, fmt.format), grid.scales, packed, fmt.format)


@given(format=st.sampled_from(["int4", "int8"]), count=st.integers(1, 33), rows=st.integers(1, 4), seed=seeds)
def test_packing_can_be_undone(format: str, count: int, rows: int, seed: int) -> None:
    bits = BITS[format]
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, format)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack(packed, format, count), codes)
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
    case.expect({ops.LINEAR_QUANTIZED: 2, aten.linear.default: 0}).settled()
    weight = graph.weights["first.weight"].read()
    fmt = scheme(name).of("first.weight")
    assert fmt is not None
    expected = x @ rounded(weight, fmt).T[:, :8] + x @ rounded(graph.weights["second.weight"].read(), fmt).T
    expected += graph.weights["second.bias"].read()
    torch.testing.assert_close(run_graph(case.graph, x)[0], expected, atol=FP32_ATTENTION, rtol=0)
    weights = {key: value for key, value in case.graph.weights.items() if key.startswith("first")}
    assert sum(weight.bytes for weight in weights.values()) == fmt.bytes(5000, 64)


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


def test_errors_of_huge_numbers_are_numbers() -> None:
    """Their squares leave float32's range, which left NaN in the manifest."""
    graph, _ = linears()
    graph.weights["first.weight"] = Weight.of(graph.weights["first.weight"].read() * 1e30)
    quantized, records = Pipeline([ConvertQuantized(INT8)]).run(graph)
    quantized.weights["first.weight.codes"].read()
    (record,) = (record for record in conversions(records) if record.weight == "first.weight")
    assert 1e26 < record.max_abs < 1e30 and 1e-4 < record.error < 0.01


def test_columns_that_blocks_do_not_divide_are_refused() -> None:
    graph, _ = linears(columns=40, rows=8)
    with pytest.raises(QuantizationError, match=r"first\.weight: 40 columns cannot be cut into blocks of 16"):
        Pipeline([ConvertQuantized(INT8)]).run(graph)


def encoded_weight(rows: int, columns: int, bad: float | None = None) -> tuple[Weight, torch.Tensor, torch.Tensor]:
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
        encoded=Encoded(
            name="codes",
            shape=(rows, columns),
            format="int8",
            bits=8,
            block=32,
            symmetric=True,
            read_rows=lambda start, stop: (codes[start:stop], scales[start:stop], None),
        ),
    )
    return weight, codes, scales


def test_codes_of_the_checkpoint_are_kept() -> None:
    """Although rounding again would choose other scales."""
    graph, _ = linears()
    weight, codes, scales = encoded_weight(5000, 64)
    graph.weights["first.weight"] = weight.to(torch.float16).to(torch.float32)
    quantized, _ = Pipeline([ConvertQuantized(INT8)]).run(graph)
    stored = quantized.weights["first.weight.codes"].read()
    assert torch.equal(stored.view(5000, 64).to(torch.int16) - 128, codes.to(torch.int16))
    assert torch.equal(quantized.weights["first.weight.scales"].read(), scales)
    assert not torch.equal(round_rows(weight.read(), INT8_BLOCK32).scales, scales)


def test_codes_on_another_grid_are_rounded() -> None:
    graph, _ = linears()
    weight, _, _ = encoded_weight(5000, 64)
    graph.weights["first.weight"] = weight
    quantized, _ = Pipeline([ConvertQuantized(scheme("int4"))]).run(graph)
    codes, scales, zeros = (
        quantized.weights[f"first.weight.{key}"].read() for key in ("codes", "scales", "zero_points")
    )
    assert torch.equal(dequantize(codes, scales, zeros, "int4"), rounded(weight.read(), ASYMMETRIC))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_of_the_checkpoint_must_be_numbers(bad: float) -> None:
    graph, _ = linears()
    graph.weights["first.weight"], _, _ = encoded_weight(5000, 64, bad)
    quantized, _ = Pipeline([ConvertQuantized(INT8)]).run(graph)
    with pytest.raises(QuantizationError, match=r"first\.weight"):
        quantized.weights["first.weight.codes"].read()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_embedding_and_head_read_one_set_of_codes(name: str, scored: Graph, tiny: Model, text: list[int]) -> None:
    case = Case(graph=scored, model=tiny).run(
        Canonicalize(), ConvertQuantized(scheme(name)), FuseGatedMLP(), PackProjections()
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
    logits = case.session(chunk=CHUNK).logits(text)
    assert 0 < np.sqrt(np.square(logits - text_logits).mean()) < FP8_WEIGHTS


# Codes of a checkpoint, under every spec.

COLUMNS = 256


def coded(
    format: Format,
    bits: int,
    block: int,
    *,
    symmetric: bool = True,
    rows: int = 40,
    seed: int = 0,
    positive: bool = False,
    offsets: bool = False,
) -> Weight:
    """A weight that is codes of some kind, with scales of either sign; or positive ones that bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.randn(rows, COLUMNS // block, generator=generator) / 100).half().float()
    if positive:
        scales = scales.abs().clamp(min=1e-4).bfloat16().float()
    zeros = None if symmetric else torch.randint(0, 2**bits, scales.shape, generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 2**bits, (rows, COLUMNS), generator=generator)
    if format == "float8_e4m3fn":
        codes = codes.where(codes & 127 != 127, 0).to(torch.uint8).view(torch.float8_e4m3fn)
        plain = codes.float()
    elif format == "float4_e2m1fn":
        codes = codes.to(torch.uint8)
        plain = float4.decode(codes)
    elif format == "sfp8":
        codes = codes.to(torch.uint8)
        plain = sfp8.decode(codes)
    elif symmetric:
        codes = (codes - 2 ** (bits - 1)).to(torch.int8)
        plain = codes.float()
    else:
        assert zeros is not None
        codes = codes.to(torch.uint8)
        plain = codes.float() - zeros.float().repeat_interleave(block, 1)
    numbers = plain * scales.repeat_interleave(block, 1)
    if offsets:
        zeros = torch.randn(scales.shape, generator=generator).half().float()
        numbers += zeros.repeat_interleave(block, 1)
    encoded = Encoded(
        shape=(rows, COLUMNS),
        name=f"{format}, {bits} bits in {block}{'' if symmetric else ' with zeros'}{' and offsets' * offsets}",
        format=format,
        bits=bits,
        block=block,
        symmetric=symmetric,
        has_offsets=offsets,
        scale_dtype="bfloat16" if positive else "float32",
        read_rows=lambda start, stop: (
            codes[start:stop],
            scales[start:stop],
            None if zeros is None else zeros[start:stop],
        ),
    )
    plain_weight = Weight.of(numbers, origin=encoded.name)
    return dataclasses.replace(plain_weight, encoded=encoded)


KINDS = {
    "Q4_0": coded("int4", 4, 32),
    "Q4_1": coded("int4", 4, 32, offsets=True),
    "Q5_0": coded("int8", 5, 32),
    "Q5_1": coded("int8", 5, 32, offsets=True),
    "Q6_K": coded("int8", 6, 16),
    "Q8_0": coded("int8", 8, 32),
    "uint4": coded("int4", 4, 64, symmetric=False),
    "uint8": coded("int8", 8, 32, symmetric=False),
    "int4 by row": coded("int4", 4, COLUMNS),
    "int8 in 128": coded("int8", 8, 128),
    "fp8": coded("float8_e4m3fn", 8, 128),
    "sfp8": coded("sfp8", 8, COLUMNS),
    "MXFP4": coded("float4_e2m1fn", 4, 32),
    "int4 of bfloat16 scales": coded("int4", 4, 32, positive=True),
    "fp8 by row of bfloat16 scales": coded("float8_e4m3fn", 8, COLUMNS, positive=True),
}
GRIDS = {
    **SPECS,
    "mxfp4": MXFP4,
    "int4 with zeros": ASYMMETRIC,
    "int8 with zeros": QuantSpec(format="int8", block=32, symmetric=False),
    "int8 in 16": QuantSpec(format="int8", block=16),
}
KEPT = {
    "Q4_0": {"int4_block32", "int8_block32", "int4 with zeros", "int8 with zeros", "int8 in 16"},
    "Q4_1": set(),
    "Q5_0": {"int8_block32", "int8 with zeros", "int8 in 16"},
    "Q5_1": set(),
    "Q6_K": {"int8 in 16"},
    "Q8_0": {"int8_block32", "int8 with zeros", "int8 in 16"},
    "uint4": {"int4 with zeros"},
    "uint8": {"int8 with zeros"},
    "int4 by row": {*SPECS, "int4 with zeros", "int8 with zeros", "int8 in 16"} 
    - {"fp8_e4m3", "sfp8", "int4_block32_bf16", "fp8_channel"},
    "int8 in 128": {"int8_block32", "int8_block128", "int8_channel", "int8 with zeros", "int8 in 16"},
    "fp8": {"fp8_e4m3"},
    "sfp8": {"sfp8"},
    "MXFP4": {"mxfp4", "int8_block32", "int8 with zeros", "int8 in 16"},
    "int4 of bfloat16 scales": {
        "int4_block32", "int4_block32_bf16", "int8_block32", "int4 with zeros", "int8 with zeros", "int8 in 16"
    },
    "fp8 by row of bfloat16 scales": {"fp8_e4m3", "fp8_channel"},
}  # fmt: skip
"""Which grids hold the codes of which format."""


def as_scheme(spec: QuantSpec) -> Scheme:
    return Scheme(name="one", linears=(spec,), table=spec)


def only(weights: Mapping[str, Weight]) -> Graph:
    """A graph with one linear, whose weight is given."""
    ((name, weight),) = weights.items()
    module = nn.ModuleDict({"first": nn.Linear(COLUMNS, weight.shape[0], bias=False)})
    module.forward = lambda x: module["first"](x)
    graph = export(module, normal(1, 2, COLUMNS))
    graph.weights[name] = weight
    return graph


def numbers_of(graph: Graph, node: Node) -> torch.Tensor:
    """What the codes of a quantised operation mean."""
    parts = [None if part is None else graph.weight_of(part)[1].read() for part in node.args[1:4]]  # type: ignore[index]
    codes, scales, zeros = parts
    assert codes is not None and scales is not None
    return dequantize(codes, scales, zeros, node.args[4])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_kept_where_the_grid_can_hold_them(kind: str, grid: str) -> None:
    """To the bit; otherwise they are rounded, and the record says how far off they are."""
    weight, spec = KINDS[kind], GRIDS[grid]
    graph, records = Pipeline([ConvertQuantized(as_scheme(spec))]).run(only({"first.weight": weight}))
    (node,) = graph.calls(ops.LINEAR_QUANTIZED)
    converted, numbers = numbers_of(graph, node), weight.read()
    (record,) = conversions(records)
    assert (record.weight, record.format, record.block) == ("first.weight", spec.format, spec.group(COLUMNS))
    assert record.source == weight.encoded.name  # type: ignore[union-attr]
    assert record.kept == (grid in KEPT[kind]) == can_hold(spec, weight.encoded)  # type: ignore[arg-type]
    error = (converted - numbers).double()
    if record.kept:
        assert torch.equal(converted, numbers) and record.error == record.max_abs == 0
    else:
        assert record.max_abs == error.abs().max() > 0
        assert record.error == pytest.approx(
            float(error.square().mean().sqrt() / numbers.double().square().mean().sqrt())
        )
        assert not torch.equal(converted, numbers)
    data = record.to_json()
    assert json.loads(json.dumps(data)) == data and data["kept"] == record.kept and data["error"] == record.error
    assert torch.equal(dequantized("first.weight", weight, as_scheme(spec)), converted)


@pytest.mark.parametrize("kind", KINDS)
def test_as_shipped_every_format_is_kept(kind: str) -> None:
    weight = KINDS[kind]
    graph, records = Pipeline([ConvertQuantized(scheme("as_shipped"))]).run(only({"first.weight": weight}))
    (node,) = graph.calls(ops.LINEAR_QUANTIZED)
    assert torch.equal(numbers_of(graph, node), weight.read())
    (record,) = conversions(records)
    assert record.kept and record.format == weight.encoded.format  # type: ignore[union-attr]


def test_errors_are_counted_once_however_often_codes_are_read() -> None:
    graph, records = Pipeline([ConvertQuantized(scheme("int4_block128"))]).run(linears()[0])
    codes, weight = graph.weights["first.weight.codes"], linears()[0].weights["first.weight"].read()
    record, _ = conversions(records)
    assert (record.source, record.kept, record.error) == ("", False, 0)
    for block in codes.blocks(limit=10_000):
        assert len(block)
    once = record.to_json()
    codes.read(), graph.weights["first.weight.scales"].read(), codes.read_rows(17, 4200)
    assert record.to_json() == once
    error = (numbers_of(graph, graph.calls(ops.LINEAR_QUANTIZED)[0]) - weight).double()
    assert record.max_abs == error.abs().max()
    assert record.error == pytest.approx(float(error.norm() / weight.double().norm()))


# Packed projections: stacked codes.


class Projections(nn.Module):
    """Projections of one input, of which the second has a bias."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(COLUMNS, 40, bias=index == 1) for index in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def projections(*weights: Weight) -> Graph:
    """Canonical, with these weights."""
    torch.manual_seed(0)
    graph, _ = Pipeline([Canonicalize()]).run(export(Projections(len(weights)), normal(1, 2, COLUMNS)))
    graph.weights |= {f"parts.{index}.weight": weight for index, weight in enumerate(weights)}
    return graph


def packed(graph: Graph, name: str) -> tuple[Graph, Sequence[PassRecord], Case]:
    """The graph quantised, and then packed."""
    quantized, records = Pipeline([ConvertQuantized(scheme(name))]).run(graph)
    return quantized, records, Case(graph=quantized).run(PackProjections())


@pytest.mark.parametrize("name", ["as_shipped", "int8", "int4", "int4_block32", "int8_channel", "fp8_e4m3", "sfp8"])
@pytest.mark.parametrize(
    "kinds",
    [
        ("Q4_0", "Q4_0", "Q4_0"),
        ("Q4_0", "Q5_0", "Q8_0"),
        ("Q5_0", "Q6_K", None),
        ("Q4_0", "int4 by row", None),
        ("Q4_1", "Q5_1", "Q4_1"),
        (None, None, None),
    ],
)
def test_packing_changes_no_number(name: str, kinds: tuple[str | None, ...]) -> None:
    """Some targets pack projections and others do not; what was codes is kept whatever its neighbours are."""
    # The parts are of very different sizes, and only the last does not fit SFP8 without a scale.
    plain = [Weight.of(normal(index, 40, COLUMNS) * 30**index / 100, "float") for index in range(3)]
    parts = [plain[index] if kind is None else KINDS[kind] for index, kind in enumerate(kinds)]
    graph, records, case = packed(projections(*parts), name)
    apart = [numbers_of(graph, node) for node in graph.calls(ops.LINEAR_QUANTIZED)]
    assert len(apart) == 3
    for index, (part, numbers) in enumerate(zip(parts, apart, strict=True)):
        key = f"parts.{index}.weight"
        assert torch.equal(numbers, dequantized(key, part, scheme(name)))
        assert conversions(records)[index].weight == key
    case.expect({ops.LINEAR_QUANTIZED: 1, aten.split_with_sizes.default: 1, aten.add.Tensor: 1}).settled()
    (node,) = case.graph.calls(ops.LINEAR_QUANTIZED)
    assert torch.equal(numbers_of(case.graph, node), torch.cat(apart))
    x = normal(2, 2, COLUMNS)
    torch.testing.assert_close(run_graph(case.graph, x), run_graph(graph, x), atol=FP32_ATTENTION, rtol=1e-6)


def test_rows_of_stacked_codes_can_be_asked_for_in_any_way() -> None:
    weights = (KINDS["Q4_0"], KINDS["Q6_K"], Weight.of(normal(0, 40, COLUMNS), "float"))
    _, _, case = packed(projections(*weights), "as_shipped")
    for part in ("codes", "scales"):
        weight = case.graph.weights[f"parts.0.weight.packed.{part}"]
        whole = weight.read()
        assert whole.shape == weight.shape
        for start, stop in ((0, 1), (39, 41), (40, 80), (10, 120), (79, 81), (119, 120)):
            assert torch.equal(weight.read_rows(start, stop), whole[start:stop])


def test_kinds_that_share_no_grid_are_kept_apart() -> None:
    kinds = ("Q8_0", "fp8", "uint4", "Q4_1")
    graph, records, case = packed(projections(*(KINDS[kind] for kind in kinds)), "as_shipped")
    case.expect_skipped("no format holds the codes of all").expect_changes(0)
    assert all(record.kept for record in conversions(records))
    for node, kind in zip(graph.calls(ops.LINEAR_QUANTIZED), kinds, strict=True):
        assert torch.equal(numbers_of(graph, node), KINDS[kind].read())


@pytest.mark.parametrize("name", ["sfp8", "int8", "int4_block32"])
def test_bad_rows_of_a_packed_weight_are_named(name: str) -> None:
    bad = normal(0, 40, COLUMNS)
    bad[7, 7] = float("nan")
    _, _, case = packed(projections(KINDS["Q4_0"], Weight.of(bad)), name)
    with pytest.raises(QuantizationError, match=r"parts\.1\.weight holds NaN or infinity in rows 0 to 40"):
        case.graph.weights["parts.0.weight.packed.codes"].read()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(COLUMNS, 40, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up_proj(x) * nn.functional.silu(self.gate_proj(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("gate", "up", "fused"), [("Q4_0", "Q8_0", 1), ("Q8_0", "fp8", 0)])
def test_gate_and_up_become_one_where_a_format_holds_both(gate: str, up: str, fused: int) -> None:
    x = normal(1, 2, COLUMNS)
    graph = export(Gated(), x)
    graph.weights |= {"gate_proj.weight": KINDS[gate], "up_proj.weight": KINDS[up]}
    converted = Case(graph=graph).run(Canonicalize(), ConvertQuantized(scheme("as_shipped")))
    case = converted.run(FuseGatedMLP()).expect({ops.GATED: fused, ops.LINEAR_QUANTIZED: 2 - fused})
    case.expect_skipped(*([] if fused else ["no format holds the codes of both"])).settled()
    expected = run_graph(converted.graph, x)
    torch.testing.assert_close(run_graph(case.graph, x), expected, atol=FP32_ATTENTION, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_scale_a_tensor_is_not_taken_of_bad_rows(bad: float) -> None:
    """The largest number of all rows is needed before the first row is rounded."""
    graph, _ = linears()
    weight = graph.weights["first.weight"].read().clone()
    weight[4321, 7] = bad
    graph.weights["first.weight"] = Weight.of(weight)
    quantized, _ = Pipeline([ConvertQuantized(scheme("sfp8"))]).run(graph)
    with pytest.raises(QuantizationError, match=r"first\.weight holds NaN or infinity in rows 0 to 5000"):
        quantized.weights["first.weight.codes"].read_rows(0, 10)


def test_a_scale_that_does_not_fit_names_the_weight() -> None:
    graph, _ = linears()
    weight = graph.weights["first.weight"].read().clone()
    weight[4500, 7] = 1e6
    graph.weights["first.weight"] = Weight.of(weight)
    quantized, _ = Pipeline([ConvertQuantized(scheme("int4_block32"))]).run(graph)
    with pytest.raises(QuantizationError, match=r"first\.weight, rows 4096 to 5000: a scale does not fit float16"):
        quantized.weights["first.weight.codes"].read()


# From a GGUF file to what every target computes with.

MIXED = {
    "attn_q.weight": "Q4_0",
    "attn_k.weight": "Q5_0",
    "attn_v.weight": "Q6_K",
    "attn_output.weight": "Q8_0",
    "token_embd.weight": "Q8_0",
    "ffn_gate.weight": "Q4_1",
    "ffn_up.weight": "Q5_1",
    "ffn_down.weight": "Q6_K",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small model of which every matrix is codes; queries, keys and values, gates and values of different kinds."""
    config = dataclasses.replace(TINY, layer_kinds=("local", "global"))
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    return load(write_gguf(path, config, random_weights(config, 0), types=MIXED))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["as_shipped", "int8", "sfp8"])
def test_a_gguf_file_means_the_same_on_every_target(target: str, name: str, mixed: Model) -> None:
    """Targets that pack projections and those that do not hold the numbers that the oracle has."""
    graph = Case.of(mixed, "decode").graph
    passes = pipeline(target, chunk=CHUNK, scheme=scheme(name))
    lowered, records = passes.run(graph)
    counts = Counter[str]()
    expected = {
        key: dequantized(key, weight, scheme(name)) for key, weight in mixed.weights.items() if len(weight.shape) == 2
    }
    nodes = dict.fromkeys(node.args[1:] for node in lowered.calls(ops.LINEAR_QUANTIZED, ops.EMBEDDING_QUANTIZED))
    for args in nodes:
        node = next(node for node in lowered.calls_all() if node.args[1:] == args)
        numbers = numbers_of(lowered, node)
        # Stacked weights are one after the other, in the order of the model.
        while len(numbers):
            key = next(key for key, part in expected.items() if torch.equal(numbers[: len(part)], part))
            counts[key] += 1
            numbers = numbers[len(expected[key]) :]
    assert counts == Counter(dict.fromkeys(expected, 1))
    if name == "as_shipped":
        assert all(torch.equal(numbers, mixed.weights[key].read()) for key, numbers in expected.items())
        assert all(record.kept and record.error == 0 for record in conversions(records))
    kept = Counter(record.source for record in conversions(records) if record.kept)
    assert (
        kept
        == {
            "as_shipped": {"Q4_0": 2, "Q4_1": 2, "Q5_0": 2, "Q5_1": 2, "Q6_K": 4, "Q8_0": 3},
            "int8": {"Q4_0": 2, "Q5_0": 2, "Q8_0": 2},
            "sfp8": {},
        }[name]
    )
