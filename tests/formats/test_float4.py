"""E2M1 is what ml_dtypes, which shares no code with us, says; integers twice as large mean the same."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from transom.formats import float4

CODES = torch.arange(16, dtype=torch.uint8)


def test_codes_and_rounding_are_those_of_ml_dtypes() -> None:
    assert np.array_equal(float4.decode(CODES).numpy(), CODES.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    # Every tie, and what lies beside it.
    numbers = np.arange(-96, 97, dtype=np.float32) / 16
    expected = numbers.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(float4.decode(float4.encode(torch.from_numpy(numbers))).numpy(), expected)
    beyond = torch.tensor([7.9, 1e9, -float("inf")])
    assert float4.decode(float4.encode(beyond)).tolist() == [6, 6, -6]


def test_integers_are_twice_as_large() -> None:
    assert torch.equal(float4.doubled(CODES).float(), 2 * float4.decode(CODES))


def test_scales_are_powers_of_two() -> None:
    """The largest number of a block lies between 4 and 8 of them; exponents are stored as E8M0."""
    largest = torch.tensor([4.0, 6.0, 7.99, 8.0, 1e-3, 0.0])
    assert float4.largest_fits(largest).tolist() == [1, 1, 1, 2, 2.0**-12, 1]
    stored = float4.scales_of(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8))
    assert stored[:4].tolist() == [2.0**-127, 2.0**-126, 1, 2.0**127] and stored[4].isnan()
