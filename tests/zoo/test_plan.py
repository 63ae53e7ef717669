from __future__ import annotations

import json
import math

import pytest

from transom.errors import TransomError
from transom.zoo.architectures import preset, presets, tensor_shapes
from transom.zoo.plan import parameters, plan


@pytest.mark.parametrize("name", presets())
def test_parameters_are_those_of_the_module(name: str) -> None:
    assert parameters(preset(name)) == sum(math.prod(shape) for shape in tensor_shapes(preset(name)).values())


@pytest.mark.parametrize(
    ("name", "non_embedding"),
    [
        ("gemma3-270m", 100_326_016),
        ("gemma3-1b", 697_896_064),
        ("gemma3-4b", 3_209_010_688),
        ("gemma3-12b", 10_759_155_456),
        ("gemma3-27b", 25_599_716_096),
    ],
)
def test_parameters_are_those_of_the_report(name: str, non_embedding: int) -> None:
    config = preset(name).text
    assert parameters(config) - config.vocab_size * config.hidden_size == non_embedding


@pytest.mark.parametrize(
    ("name", "per_token", "past_window", "fixed_local", "gb_32k", "gb_128k"),
    [
        ("gemma3-270m", 18_432, 3_072, 7_864_320, (0.604, 0.109), (2.416, 0.411)),
        ("gemma3-1b", 26_624, 4_096, 11_534_336, (0.872, 0.146), (3.490, 0.548)),
        ("gemma3-4b", 139_264, 20_480, 121_634_816, (4.563, 0.793), (18.254, 2.806)),
        ("gemma3-12b", 393_216, 65_536, 335_544_320, (12.885, 2.483), (51.540, 8.925)),
        ("gemma3-27b", 507_904, 81_920, 436_207_616, (16.643, 3.121), (66.572, 11.174)),
    ],
)
def test_cache_bytes(
    name: str,
    per_token: int,
    past_window: int,
    fixed_local: int,
    gb_32k: tuple[float, float],
    gb_128k: tuple[float, float],
) -> None:
    config = preset(name)
    for context, (everything, bounded) in ((32 * 1024, gb_32k), (128 * 1024, gb_128k)):
        planned = plan(config, context=context)
        assert planned.cache_bytes_global_only == context * per_token
        assert planned.cache_bytes_bounded == context * past_window + fixed_local
        assert planned.cache_bytes_bounded == sum(layer.bytes for layer in planned.layers)
        assert round(planned.cache_bytes_global_only / 1e9, 3) == everything
        assert round(planned.cache_bytes_bounded / 1e9, 3) == bounded


def test_a_context_within_the_window_saves_nothing() -> None:
    planned = plan(preset("gemma3-1b"), context=100)
    assert planned.cache_bytes_bounded == planned.cache_bytes_global_only
    assert {layer.slots for layer in planned.layers} == {100}


def test_cache_dtype_and_batch_are_factors() -> None:
    config = preset("gemma3-4b")
    base = plan(config, context=4096).cache_bytes_bounded
    assert plan(config, context=4096, cache_dtype="int8").cache_bytes_bounded * 2 == base
    assert plan(config, context=4096, cache_dtype="fp32", batch=3).cache_bytes_bounded == base * 6


def test_weight_bytes_by_hand() -> None:
    # gemma3-tiny: 6 layers; D 64, F 96, N*H 128, K*H 64; 512 embedding rows; blocks of 32, and 64 in the table.
    config = preset("gemma3-tiny")
    norms = 4 * (6 * (4 * 64 + 2 * 32) + 64)
    int8_embedding = 512 * (64 + 4)
    int8_layer = (128 + 64 + 64) * (64 + 8) + 64 * (128 + 16) + 2 * 96 * (64 + 8) + 64 * (96 + 12)
    # Queries, keys and values stay at 8 bits.
    int4_layer = (128 + 64 + 64) * (64 + 8) + 64 * (64 + 16 + 2) + 2 * 96 * (32 + 8 + 1) + 64 * (48 + 12 + 2)
    assert plan(config, context=1).weight_bytes == 2 * 292_800
    assert plan(config, context=1, quant="int8").weight_bytes == norms + int8_embedding + 6 * int8_layer
    assert plan(config, context=1, quant="int4").weight_bytes == norms + int8_embedding + 6 * int4_layer


def test_json() -> None:
    data = json.loads(json.dumps(plan(preset("gemma3-tiny"), context=64).to_json()))
    assert data["weight_dtype"] == "bf16"
    assert data["layers"][0] == {"index": 0, "kind": "local", "window": 16, "slots": 16, "bytes": 16 * 2 * 2 * 32 * 2}
    assert data["layers"][2] == {"index": 2, "kind": "global", "window": None, "slots": 64, "bytes": 64 * 256}


@pytest.mark.parametrize("wrong", [{"context": 0}, {"batch": 0}, {"quant": "int3"}, {"cache_dtype": "int2"}])
def test_unknown_formats_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(TransomError, match=r"int3|int2|positive"):
        plan(preset("gemma3-tiny"), **({"context": 64} | wrong))  # type: ignore[arg-type]
