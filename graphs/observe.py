"""`transom.observe`: what a tensor's numbers are, as a tensor; see `formats.observation` for what it holds."""

from __future__ import annotations

import math

import torch

from transom.formats.observation import BUCKETS, EXTREMES, KEPT_BITS, SIZE
from transom.graphs.ops import BODIES


def _observe(x: torch.Tensor) -> torch.Tensor:
    """Minimum, maximum, zeros and counts of a tensor's numbers, float64 [SIZE], as `Observation.of` reads them.

    Numbers are read as float32: what that cannot hold counts as infinite.
    """
    statistic = torch.zeros(SIZE, dtype=torch.float64, device=x.device)
    numbers = x.detach().float().reshape(-1)
    # The top bits of a float32 are its sign, its exponent and the first bits of its mantissa.
    buckets = (numbers.view(torch.int32) >> (32 - KEPT_BITS)) & (BUCKETS - 1)
    counts = torch.bincount(buckets, minlength=BUCKETS)
    zeros = 0
    if counts[0] or counts[BUCKETS // 2]:
        # They share their buckets with the smallest of subnormal numbers.
        positive, negative = (int((numbers.view(torch.int32) == bits).sum()) for bits in (0, -(2**31)))
        counts[0] -= positive
        counts[BUCKETS // 2] -= negative
        zeros = positive + negative
    if counts.view(2, -1)[:, -16:].any():
        numbers = numbers[torch.isfinite(numbers)]
    extremes = numbers.aminmax() if numbers.numel() else (math.inf, -math.inf)
    for index, value in enumerate((*extremes, zeros)):
        statistic[index] = value
    statistic[EXTREMES:] = counts
    return statistic


observe = torch.library.custom_op("transom::observe", _observe, mutates_args=())


@observe.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((SIZE,), dtype=torch.float64)


OBSERVE = torch.ops.transom.observe.default

BODIES[OBSERVE] = _observe
