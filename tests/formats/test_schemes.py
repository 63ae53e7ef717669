"""Schemes by name, what a spec may be, and that planned bytes are those of the codes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.case import Case
from transom.errors import QuantizationError
from transom.formats.schemes import MXFP4, SCHEMES, SPECS, QuantSpec, scheme
from transom.graphs.graph import Graph
from transom.passes.canonicalize import Canonicalize
from transom.passes.convert_quantized import ConvertQuantized
from transom.zoo.model import Model
from transom.zoo.plan import plan

NAMES = {
    "none", "int8", "int4", "int4_table", "fp8", "fp8_activations", "as_shipped", "int4_block32", "int4_block128",
    "int4_channel", "int8_block32", "int8_block128", "int8_channel", "fp8_e4m3", "sfp8", "int4_block32_bf16",
    "fp8_channel", "fp8_channel_activations", "mxfp4",
}  # fmt: skip
TABLE, QUERY, DOWN = "embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"


def test_every_name() -> None:
    assert set(SCHEMES) == NAMES
    for name in NAMES:
        assert scheme(name) is SCHEMES[name] and scheme(name).name == name


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_by_name_is_for_every_projection(name: str) -> None:
    chosen = scheme(name)
    assert chosen.of(QUERY) == chosen.of(DOWN) == SPECS[name]
    own = ("sfp8", "int4_block32_bf16", "fp8_channel")
    assert chosen.of(TABLE) == SPECS[name if name in own else "int8_block128"]
    assert chosen.formats == {SPECS[name].format, chosen.of(TABLE).format}  # type: ignore[union-attr]


def test_the_table_may_be_chosen_apart() -> None:
    chosen = scheme("int4_channel:fp8_e4m3")
    assert chosen.name == "int4_channel:fp8_e4m3" and not chosen.as_shipped and chosen.activations is None
    assert chosen.of(DOWN) is SPECS["int4_channel"] and chosen.of(TABLE) is SPECS["fp8_e4m3"]
    assert scheme("none:sfp8").of(DOWN) is None and scheme("none:sfp8").specs == (SPECS["sfp8"],)
    assert scheme("sfp8:none").of(TABLE) is None and scheme("sfp8:none").formats == {"sfp8"}
    assert scheme("none:none").specs == ()


def test_queries_keys_and_values_are_finer_under_int4() -> None:
    chosen = scheme("int4")
    for kind in ("q", "k", "v", "qkv"):
        assert chosen.of(f"layers.3.self_attn.{kind}_proj.weight").bits == 8  # type: ignore[union-attr]
    for name in (DOWN, "layers.3.self_attn.o_proj.weight", "layers.3.mlp.gate_up_proj.weight"):
        spec = chosen.of(name)
        assert spec is not None and (spec.bits, spec.symmetric) == (4, False)


def test_attention_is_finer_under_mxfp4() -> None:
    chosen = scheme("mxfp4")
    for kind in ("q", "k", "v", "o"):
        assert chosen.of(f"layers.3.self_attn.{kind}_proj.weight").format == "int8"  # type: ignore[union-attr]
    for name in (DOWN, "layers.3.mlp.experts.gate_up_proj"):
        assert chosen.of(name) == MXFP4
    assert chosen.of("layers.3.mlp.router.weight") is None


def test_activations_are_among_the_numbers() -> None:
    assert scheme("fp8_activations").formats == {"float8_e4m3fn", "int8"}
    assert scheme("fp8_activations").activations == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int3", "no quantisation scheme named 'int3': choose one of none, int8, int4"),
        ("", "no quantisation scheme named ''"),
        ("int4:", "'int4:' is no quantisation scheme: on either side of the colon .*int4_block32.*, not 'int4'"),
        ("int4_channel:", "'int4_channel:' .* not ''"),
        (":int8_block32", "':int8_block32' .* not ''"),
        ("int4_channel:int7", "not 'int7'"),
        ("int4_channel:sfp8:sfp8", "not 'sfp8:sfp8'"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        scheme(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int3", "block": 32}, "unknown format 'int3': choose one of int4, int8, float8_e4m3fn, sfp8"),
        ({"format": "int4", "block": 8}, "powers of two from 16 on, not 8"),
        ({"format": "int4", "block": 48}, "powers of two from 16 on, not 48"),
        ({"format": "int4", "block": 0}, "not 0"),
        ({"format": "sfp8", "block": "tensor", "symmetric": False}, "sfp8 has no zero points"),
        ({"format": "float8_e4m3fn", "block": 32, "symmetric": False}, "float8_e4m3fn has no zero points"),
        ({"format": "int4", "block": 32, "symmetric": False, "has_offsets": True}, "only integers that have no zero"),
        ({"format": "sfp8", "block": 32, "has_offsets": True}, "only integers"),
    ],
)
def test_bad_specs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        QuantSpec(**fields)


def test_blocks_are_halved_until_they_divide() -> None:
    wide = QuantSpec(format="int8", block=256)
    assert [(wide.group(n), wide.stored_block(n)) for n in (512, 640, 96, 48)] == [
        (256, 128),
        (128, 128),
        (32, 32),
        (16, 16),
    ]
    row = QuantSpec(format="int8", block="row")
    assert [(row.group(n), row.stored_block(n)) for n in (640, 96)] == [(640, 128), (96, 32)]
    for spec in (wide, row):
        with pytest.raises(QuantizationError, match="40 columns cannot be cut into blocks of 16 or more"):
            spec.stored_block(40)


def test_in_words() -> None:
    assert QuantSpec(format="int4", block=32, symmetric=False).describe() == "int4 in blocks of 32 with zero points"
    offsets = QuantSpec(format="int4", block=32, has_offsets=True)
    assert offsets.describe() == "int4 in blocks of 32 with offsets" and QuantSpec.of_key(offsets.key) == offsets
    assert SPECS["int4_channel"].describe() == "int4 by row"
    assert SPECS["sfp8"].describe() == "sfp8 by tensor"


@pytest.fixture(scope="module")
def plain(scored: Graph) -> Graph:
    return Case(graph=scored).run(Canonicalize()).graph


@pytest.mark.parametrize("name", [*sorted(NAMES), "int4_channel:int4_block32", "sfp8:none"])
def test_planned_bytes_are_those_of_the_codes(name: str, tiny: Model, plain: Graph) -> None:
    """The pass makes what the planner counts, to the byte; only what stays unquantised is planned in bfloat16."""
    graph = plain.clone()
    assert ConvertQuantized(scheme(name)).rewrite(graph).changes > 0 or name == "none"
    total = 0
    for key, weight in graph.weights.items():
        if ".weight" not in key or f"{key}.codes" in graph.weights:
            continue  # tables of rotations are none of the model's, and the manager drops what nobody reads
        wide = key.endswith("weight") and (len(weight.shape) == 2 or name == "none")
        total += weight.bytes // 2 if wide else weight.bytes
    assert total == plan(tiny.config, context=64, quant=name).weight_bytes
