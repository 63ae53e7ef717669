"""Rounding to grids: what llama.cpp makes of the same numbers, how far off each spec may be, and odd blocks."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.errors import QuantizationError
from transom.formats.quantized import decode
from transom.formats.rounding import Method, Rounded, encode, find_grid, round_rows, values
from transom.formats.schemes import MXFP4, SPECS, QuantSpec

ASYMMETRIC = QuantSpec(format="int4", block=32, symmetric=False)
POSITIVE = QuantSpec(format="int4", block=32)
ALL: dict[str, QuantSpec] = {
    **SPECS,
    "mxfp4": MXFP4,
    "int4 asymmetric": ASYMMETRIC,
    "int8 asymmetric": QuantSpec(format="int8", block=32, symmetric=False),
    "int4 positive": POSITIVE,
    "fp8 by row": QuantSpec(format="float8_e4m3fn", block="row"),
    "fp8 by tensor": QuantSpec(format="float8_e4m3fn", block="tensor"),
    "sfp8 in blocks": QuantSpec(format="sfp8", block=32),
}
Q4_0 = SPECS["int4_block32"]

METHODS: tuple[Method, ...] = ("nearest", "mse")

seeds = st.integers(0, 2**31)
names = st.sampled_from(list(ALL))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(rows: torch.Tensor) -> float:
    return float(rows.abs().max())


def round_all(rows: torch.Tensor, spec: QuantSpec, method: Method = "nearest") -> Rounded:
    return round_rows(rows, spec, method, tensor_max=largest(rows))


def again(rows: torch.Tensor, spec: QuantSpec, method: Method = "nearest") -> torch.Tensor:
    """Rounded, and back."""
    rounded = round_all(rows, spec, method)
    return decode(rounded.codes, rounded.scales, rounded.zero_points, spec.format).view_as(rows)


def relative(rows: torch.Tensor, spec: QuantSpec, method: Method = "nearest") -> float:
    return float((again(rows, spec, method) - rows).square().mean() / rows.square().mean())


# llama.cpp's Q4_0.


def ggml(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [R, 32] with zero as 8, scales [R] and numbers [R, 32] that the `gguf` package makes of blocks [R, 32]."""
    raw = gguf.quants.quantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0)
    scales, packed = np.hsplit(raw, [2])
    codes = np.concatenate((packed & 15, packed >> 4), 1)
    numbers = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    wide = scales.copy().view(np.float16).astype(np.float32)[:, 0]
    return torch.from_numpy(codes), torch.from_numpy(wide), torch.from_numpy(numbers)


def odd_blocks() -> torch.Tensor:
    """Blocks of which rounding is easily got wrong."""
    steps = torch.arange(-16, 16) / 2
    blocks = {
        "spike": torch.zeros(32).index_fill(0, torch.tensor([5]), 3.0),
        "negative spike": torch.zeros(32).index_fill(0, torch.tensor([31]), -3.0),
        "two that are as large": torch.tensor([1.0, -1.0] * 16),
        "the same, negative first": torch.tensor([-1.0, 1.0] * 16),
        # Half codes, with a step that float32 cannot invert exactly.
        "ties": steps * 0.1,
        "ties, positive": -steps * 0.3,
        "ties of Q5_0": torch.arange(-16, 16) * 0.0123,
        "tiny": steps * 1e-7,
        "below float16": steps * 1e-10,
        "constant": torch.full((32,), 0.7),
    }
    return torch.stack(list(blocks.values()))


@pytest.mark.parametrize("blocks", [odd_blocks(), normal(0, 4000, 32), normal(1, 4000, 32) ** 3])
def test_int4_block32_is_q4_0_to_the_bit(blocks: torch.Tensor) -> None:
    codes, scales, numbers = ggml(blocks)
    rounded = round_rows(blocks, Q4_0)
    assert torch.equal(rounded.codes[:, 0], codes)
    assert torch.equal(rounded.scales[:, 0], scales)
    assert torch.equal(again(blocks, Q4_0), numbers)
    assert bool((rounded.scales < 0).any() and (rounded.scales > 0).any())


def test_int4_block32_is_q4_0_on_ties_of_every_scale() -> None:
    """Half of the numbers of a Q5_0 checkpoint stand between two codes of Q4_0."""
    scales = torch.rand(5000, 1, generator=torch.Generator().manual_seed(2)) - 0.5
    codes = torch.randint(-16, 16, (5000, 32), generator=torch.Generator().manual_seed(3))
    codes[:, 0] = -16
    blocks = codes * scales
    assert torch.equal(round_rows(blocks, Q4_0).codes[:, 0], ggml(blocks)[0])


def test_a_block_of_zeros_under_int4_block32() -> None:
    """Codes and numbers are Q4_0's; its scale is 0 there and ours 1, which means the same."""
    codes, scales, _ = ggml(torch.zeros(1, 32))
    rounded = round_rows(torch.zeros(1, 32), Q4_0)
    assert torch.equal(rounded.codes[:, 0], codes) and bool((codes == 8).all())
    assert scales.item() == 0 and rounded.scales.item() == 1


@pytest.mark.parametrize("tiny", [1e-38, 1e-39, 1e-45])
def test_numbers_whose_step_has_no_reciprocal_become_zero(tiny: float) -> None:
    blocks = torch.zeros(1, 32)
    blocks[0, :3] = torch.tensor([tiny, -tiny, tiny / 2])
    for method in METHODS:
        assert torch.equal(again(blocks, Q4_0, method), torch.zeros(1, 32))
        assert torch.equal(values(blocks[None], find_grid(blocks[None], Q4_0, method), Q4_0), torch.zeros(1, 1, 32))


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    rows = normal(0, 2, 64)
    rows[1, 40] = 8 * 65520.0
    with pytest.raises(QuantizationError, match="a scale does not fit float16: choose a scheme with float32 scales"):
        round_rows(rows, Q4_0)
    rows[1, 40] = 8 * 65500.0
    assert again(rows, Q4_0)[1, 40] == 8 * 65504.0
    assert largest(again(rows * 1e6, POSITIVE)) == pytest.approx(8 * 65500e6)


# Every spec.


def step(spec: QuantSpec, rows: torch.Tensor) -> torch.Tensor:
    """Largest error of nearest rounding, [R, K], where numbers are not clipped."""
    rounded = round_all(rows, spec)
    scales = rounded.scales.abs().repeat_interleave(rounded.codes.shape[2], 1)
    if spec.format == "float8_e4m3fn":
        return torch.maximum(rows.abs() / 16, scales * 2**-10)
    if spec.format == "sfp8":
        return torch.maximum(rows.abs() / 8, scales * 2**-23)
    if spec.format == "float4_e2m1fn":
        # What lies beyond 6 is clipped, by a quarter at most, as nothing reaches 8.
        return torch.maximum(rows.abs(), scales) / 4
    # With a signed scale, the side away from the extreme number ends one code earlier.
    return scales * (1.0 if spec.signed_scale else 0.5)


@given(name=names, seed=seeds, exponent=st.integers(-6, 4), offset=st.floats(-2, 2))
def test_errors_are_bounded(name: str, seed: int, exponent: int, offset: float) -> None:
    spec, rows = ALL[name], (normal(seed, 3, 256) + offset) * 10.0**exponent
    # A scale in float16 moves every number by half a unit in its last place, or by a subnormal one.
    loose = 1e-5 if spec.scale_dtype == "float32" else 2**-10
    allowed = step(spec, rows) * (1 + loose) + rows.abs() * loose
    if spec.scale_dtype == "float16":
        allowed += 8 * 2**-25
    assert bool(((again(rows, spec) - rows).abs() <= allowed).all())


@given(name=names, seed=seeds, method=st.sampled_from(METHODS))
def test_values_are_what_the_codes_mean(name: str, seed: int, method: Method) -> None:
    """Exactly, so that fake quantisation computes with the numbers that are deployed."""
    spec, rows = ALL[name], normal(seed, 3, 256) * 3
    rows[0, :32] = 0
    blocks = rows.view(3, -1, spec.group(256))
    grid = find_grid(blocks, spec, method, tensor_max=largest(rows))
    encoded = encode(blocks, grid, spec)
    expected = decode(encoded.codes, encoded.scales, encoded.zero_points, spec.format)
    assert torch.equal(values(blocks, grid, spec), expected)
    assert torch.equal(again(rows, spec, method), expected.view_as(rows)), "held blocks mean the same"


@given(name=names, seed=seeds, method=st.sampled_from(METHODS))
def test_zeros_stay_zero(name: str, seed: int, method: Method) -> None:
    rows = normal(seed, 4, 256) + 0.5
    rows[0] = 0
    rows[1, ::3] = 0
    rows[2, 32:128] = 0
    numbers = again(rows, ALL[name], method)
    assert bool((numbers[rows == 0] == 0).all()) and bool(numbers[1].any())


@given(name=names, seed=seeds, height=st.integers(2, 5), method=st.sampled_from(METHODS))
def test_a_row_is_rounded_by_itself(name: str, seed: int, height: int, method: Method) -> None:
    spec, rows = ALL[name], normal(seed, height, 128)
    alone = [round_rows(row[None], spec, method, tensor_max=largest(rows)) for row in rows]
    rounded = round_all(rows, spec, method)
    for part in ("codes", "scales", "zero_points"):
        whole, pieces = getattr(rounded, part), [getattr(one, part) for one in alone]
        assert whole is None or torch.equal(whole.float(), torch.cat(pieces).float())


@pytest.mark.parametrize("name", ALL)
def test_rounding_again_changes_nothing(name: str) -> None:
    """Of what is on a grid already; a grid that is found anew lies where the largest number puts it."""
    spec, rows = ALL[name], normal(5, 8, 256)
    once = again(rows, spec)
    torch.testing.assert_close(again(once, spec), once, rtol=2e-3 if spec.scale_dtype == "float16" else 1e-5, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("columns", "widest"), [(640, 128), (96, 32), (48, 16)])
def test_sizes_that_a_block_does_not_divide(name: str, columns: int, widest: int) -> None:
    spec, rows = ALL[name], normal(6, 3, columns)
    rounded = round_all(rows, spec)
    block = min(widest, spec.block) if isinstance(spec.block, int) else widest
    assert rounded.codes.shape == (3, columns // block, block) and rounded.scales.shape == (3, columns // block)
    groups = {"row": 3, "tensor": 1}.get(str(spec.block))
    assert groups is None or len(set(rounded.scales.flatten().tolist())) == groups
    assert relative(rows, spec) < 0.02
    with pytest.raises(QuantizationError, match="40 columns cannot be cut into blocks of 16 or more"):
        round_all(normal(6, 3, 40), spec)


@pytest.mark.parametrize("name", ["sfp8", "fp8 by tensor"])
def test_one_scale_a_tensor_does_not_depend_on_the_rows_at_hand(name: str) -> None:
    rows = normal(7, 10, 64) * 9
    whole = round_all(rows, ALL[name])
    part = round_rows(rows[:1], ALL[name], tensor_max=largest(rows))
    assert len(set(whole.scales.flatten().tolist())) == 1 and torch.equal(whole.scales[:1], part.scales)
    with pytest.raises(QuantizationError, match=r"by tensor needs the largest number of the whole tensor"):
        round_rows(rows, ALL[name])


# Scales that are searched for.

SEARCHED = [name for name, spec in ALL.items() if spec.block != "tensor"]


def squares(rows: torch.Tensor, spec: QuantSpec, method: Method) -> torch.Tensor:
    error = again(rows, spec, method) - rows
    return error.square().view(len(rows), -1, spec.group(rows.shape[1])).sum(-1)


@settings(max_examples=30)
@given(name=names, seed=seeds, power=st.sampled_from([1, 3]))
def test_searched_scales_are_never_worse(name: str, seed: int, power: int) -> None:
    rows = normal(seed, 4, 128) ** power
    plain, best = (squares(rows, ALL[name], method) for method in METHODS)
    assert bool((best <= plain * (1 + 1e-6)).all()), "in every block"


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_scales_are_better_on_gaussians(name: str) -> None:
    rows = normal(8, 64, 256)
    assert relative(rows, ALL[name], "mse") < relative(rows, ALL[name])


def test_errors_on_gaussians() -> None:
    """Relative mean squares that were measured independently, to 3%."""
    rows = normal(9, 512, 1024)
    measured = {
        "asymmetric": (relative(rows, ASYMMETRIC), 0.0065),
        "q4_0": (relative(rows, Q4_0), 0.0074),
        "positive, searched": (relative(rows[:128], POSITIVE, "mse"), 0.0075),
        "positive": (relative(rows, POSITIVE), 0.0094),
    }
    for name, (error, expected) in measured.items():
        assert error == pytest.approx(expected, rel=0.03), name


def test_important_columns_are_rounded_better() -> None:
    rows = normal(10, 200, 32)
    blocks = rows.view(200, 1, 32)
    importance = torch.ones(1, 32)
    importance[0, :4] = 100

    def error(weights: torch.Tensor | None) -> torch.Tensor:
        grid = find_grid(blocks, POSITIVE, "mse", importance_GC=weights)
        return (values(blocks, grid, POSITIVE) - blocks).square() * importance

    assert bool((error(importance).sum(-1) <= error(None).sum(-1) * (1 + 1e-6)).all())
    assert error(importance).sum() < 0.8 * error(None).sum()
    same = find_grid(blocks, POSITIVE, "mse", importance_GC=torch.full((1, 32), 4.0))
    assert torch.equal(same.divisors, find_grid(blocks, POSITIVE, "mse").divisors), "only shares count"


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["int8_block32", "int4_block32", "fp8_e4m3", "int4 asymmetric", "sfp8", "mxfp4"])
def test_what_is_no_number_has_no_scale(name: str, bad: float) -> None:
    rows = normal(11, 2, 64)
    rows[1, 3] = bad
    with pytest.raises(QuantizationError, match="a scale does not fit"):
        round_all(rows, ALL[name])


def test_scales_are_rounded_only_in_the_dtype_of_the_spec() -> None:
    rows = normal(12, 8, 64)
    half = dataclasses.replace(POSITIVE, scale_dtype="float16")
    exact, rounded = round_all(rows, POSITIVE), round_all(rows, half)
    assert torch.equal(exact.codes, rounded.codes), "codes come of the scales before they are rounded"
    assert torch.equal(exact.scales.half().float(), rounded.scales) and not torch.equal(exact.scales, rounded.scales)
