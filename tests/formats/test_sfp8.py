"""SFP8 against its definition: known answers, every code, and the nearest of all 255 numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transom.errors import QuantizationError
from transom.formats import sfp8
from transom.formats.quantized import dequantize
from transom.formats.rounding import round_rows
from transom.formats.schemes import SPECS

CODES = torch.tensor([code for code in range(256) if code != 0x80], dtype=torch.uint8)
SMALLEST = 1.25 * 2**-23
WORST = 1 / 9
"""Largest relative error of two bits of mantissa: half a step of a quarter, at the number 1.125."""


def by_hand(code: int) -> float:
    """The definition, without bit tricks."""
    low, sign = code & 127, -1 if code >= 128 else 1
    if low == 0:
        return 0.0
    if low >= 64:
        return sign * math.ldexp(1 + (low & 7) / 8, (low >> 3) - 15)
    return sign * math.ldexp(1 + (low & 3) / 4, (low >> 2) - 23)


def encoded(*numbers: float) -> list[int]:
    return [int(code) for code in sfp8.encode(torch.tensor(numbers))]


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    return sfp8.decode(sfp8.encode(numbers))


def test_every_code_is_what_the_definition_says_and_comes_back() -> None:
    numbers = sfp8.decode(CODES)
    assert numbers.tolist() == [by_hand(int(code)) for code in CODES]
    assert torch.equal(sfp8.encode(numbers), CODES)
    assert len(set(numbers.tolist())) == 255
    assert numbers.max() == -numbers.min() == sfp8.LARGEST == 1.875
    assert numbers[numbers > 0].min() == SMALLEST
    assert torch.equal(numbers.to(torch.bfloat16).float(), numbers)
    assert torch.equal(numbers[:127].sort().values, numbers[:127]), "codes stand in the order of their numbers"


def test_known_answers() -> None:
    assert encoded(1.0, -0.5, 2**-7, 1.875, -1.875, 0.0, -0.0) == [0x78, 0xF0, 0x40, 0x7F, 0xFF, 0, 0]
    answers = {
        0.484375: 0.5,
        0.296875: 0.3125,
        0.265625: 0.25,
        0.00732421875: 0.0078125,
        1.0625: 1.0,
        0.013841: 0.013671875,
    }
    assert rounded(torch.tensor(list(answers))).tolist() == list(answers.values())
    assert rounded(-torch.tensor(list(answers))).tolist() == [-number for number in answers.values()]


def test_the_smallest_numbers() -> None:
    """The code of 2 ** -23 means zero, so its number gives way to the next; what rounds to less becomes zero."""
    above, below = 0.9375 * 2**-23, 0.9374 * 2**-23
    assert encoded(2**-23, SMALLEST, -(2**-23), above, below, -below, 1e-40) == [1, 1, 0x81, 1, 0, 0, 0]


def test_larger_numbers_become_the_largest() -> None:
    assert encoded(1.9, 2.0, 1e30, math.inf, -7.0) == [0x7F, 0x7F, 0x7F, 0x7F, 0xFF]


def test_the_largest_relative_error() -> None:
    dense = torch.cat([torch.linspace(2.0**low, 2.0 ** (low + 1), 4097) for low in range(-22, 0)])
    errors = (rounded(dense) - dense).abs() / dense
    assert errors.max() == pytest.approx(WORST, rel=1e-6)
    assert errors[dense >= 2**-7].max() == pytest.approx(1 / 17, rel=1e-6), "three bits of mantissa"


@given(exponent=st.floats(-23, 0.9), negative=st.booleans())
def test_nothing_is_nearer(exponent: float, negative: bool) -> None:
    number = torch.tensor([2.0**exponent * (-1 if negative else 1)])
    # Zero is no choice for what is not smaller than 2 ** -23.
    others = sfp8.decode(CODES[CODES != 0])
    error, best = float((rounded(number) - number).abs()), float((others - number).abs().min())
    assert error == best


def test_one_scale_a_tensor_and_only_where_it_is_needed() -> None:
    spec = SPECS["sfp8"]
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).clamp(-1.875, 1.875)
    small = round_rows(rows, spec, tensor_max=1.875)
    assert (small.scales == 1).all() and small.zero_points is None
    assert torch.equal(dequantize(small.codes, small.scales, None, "sfp8"), rounded(rows))
    large = round_rows(rows * 16, spec, tensor_max=30.0)
    assert (large.scales == 16).all() and torch.equal(large.codes, small.codes)
    with pytest.raises(QuantizationError, match="needs the largest number of the whole tensor"):
        round_rows(rows, spec)
