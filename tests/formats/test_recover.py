"""Grids of numbers that stand on one: found, verified, and not made up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transom.formats.quantized import decode
from transom.formats.recover import recover, saved_dtype
from transom.formats.rounding import Rounded, round_rows
from transom.formats.schemes import SPECS, QuantSpec

FOUR_BITS = ["int4_block32", "int4_block128", "int4_channel"]
COLUMNS = 256


def on_grid(spec: QuantSpec, seed: int, exponent: int = -5) -> tuple[torch.Tensor, Rounded]:
    """What somebody's codes mean, float32 [8, COLUMNS]."""
    rows = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rows[0, :128] = 0
    rounded = round_rows(rows, spec)
    return decode(rounded.codes, rounded.scales, None, spec.format).view_as(rows), rounded


def blocks(numbers: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    return numbers.view(len(numbers), -1, spec.group(COLUMNS))


@given(
    name=st.sampled_from(FOUR_BITS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-8, 3),
)
def test_codes_are_found_again(name: str, dtype: torch.dtype, seed: int, exponent: int) -> None:
    spec = SPECS[name]
    numbers, codes = on_grid(spec, seed, exponent)
    saved = numbers.to(dtype).float()
    recovered = recover(blocks(saved, spec), spec, saved_dtype(saved))
    assert recovered is not None
    again = decode(recovered.codes, recovered.scales, None, spec.format).view_as(numbers)
    assert torch.equal(again.to(dtype).float(), saved), "every number is given exactly, as it was saved"
    expected = torch.where(numbers == 0, 8, codes.codes.view_as(numbers))
    assert torch.equal(torch.where(saved == 0, 8, recovered.codes.view_as(numbers)), expected.to(torch.uint8))


@pytest.mark.parametrize("name", ["int8_block32", "int8_channel"])
def test_eight_bits_are_found_where_they_were_not_rounded_away(name: str) -> None:
    spec = SPECS[name]
    numbers, codes = on_grid(spec, 1)
    for dtype in (torch.float16, torch.float32):
        saved = numbers.to(dtype).float()
        recovered = recover(blocks(saved, spec), spec, saved_dtype(saved))
        assert recovered is not None and torch.equal(recovered.codes.view_as(numbers), codes.codes.view_as(numbers))


@pytest.mark.parametrize("name", [*FOUR_BITS, "int8_block32"])
def test_numbers_on_no_grid_have_none(name: str) -> None:
    spec = SPECS[name]
    numbers = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert recover(blocks(numbers, spec), spec, saved_dtype(numbers)) is None


def test_one_number_off_the_grid_is_enough() -> None:
    spec = SPECS["int4_block32"]
    numbers = on_grid(spec, 2)[0].bfloat16().float()
    numbers[5, 77] = (numbers[5, 77] * (1 + 2**-6)).bfloat16().float() + 2**-12
    assert recover(blocks(numbers, spec), spec, (torch.bfloat16, 8)) is None


def test_grids_that_use_few_codes() -> None:
    """Largest codes of 3 and of 1, as trained weights may have."""
    spec = SPECS["int4_block32"]
    numbers = torch.zeros(2, COLUMNS)
    numbers[0, :32:5], numbers[0, 1:32:5] = 0.0123 * 3, -0.0123
    numbers[1, 40] = 0.7
    saved = numbers.bfloat16().float()
    recovered = recover(blocks(saved, spec), spec, saved_dtype(saved))
    assert recovered is not None
    assert torch.equal(decode(recovered.codes, recovered.scales, None, "int4").view_as(saved).bfloat16().float(), saved)


def test_the_narrowest_dtype_is_found() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert saved_dtype(x)[0] == torch.float32
    assert saved_dtype(x.half().float())[0] == torch.float16
    assert saved_dtype(x.bfloat16().float())[0] == torch.bfloat16
    assert saved_dtype(torch.zeros(3))[0] == torch.bfloat16
