"""Where the numbers that are trained begin, before they are rounded."""

from __future__ import annotations

import torch

from transom.formats.schemes import QuantSpec


def into_cells(weight_RK: torch.Tensor, calibrated_RK: torch.Tensor, divisors_RG: torch.Tensor) -> torch.Tensor:
    """Numbers that round to the calibrated ones.

    Those that do so already stay. The others go into their cell, as far from its centre as from its border: at the
    border itself the noise of a few steps would turn them back, and the calibrated codes would be lost.
    """
    step_RK = _by_column(divisors_RG.abs(), weight_RK)
    away_RK = weight_RK - calibrated_RK
    return torch.where(away_RK.abs() < 0.49 * step_RK, weight_RK, calibrated_RK + 0.25 * step_RK * away_RK.sign())


def _by_column(x_RG: torch.Tensor, weight_RK: torch.Tensor) -> torch.Tensor:
    return x_RG.repeat_interleave(weight_RK.shape[1] // x_RG.shape[1], 1)


def dithered(
    weight_RK: torch.Tensor, divisors_RG: torch.Tensor, spec: QuantSpec, generator: torch.Generator
) -> torch.Tensor:
    """Noise for weights that were quantised before: many then stand just between two codes, and all turn at once.

    On the 270M's GGUF half of the numbers of Q5_0 tensors are ties of Q4_0, and the first step of Adam explodes
    without noise. A sixteenth of a step of the grid to either side is no loss.
    """
    if not spec.is_integer:
        return weight_RK
    noise_RK = torch.rand(weight_RK.shape, generator=generator) - 0.5
    return weight_RK + 0.125 * noise_RK * _by_column(divisors_RG.abs(), weight_RK)
