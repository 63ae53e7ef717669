"""GPTQ rounds weights one column after the other; the columns that are still free compensate the error of each.

Source: arXiv 2210.17323. Scales are chosen beforehand and stay, so columns can be taken in the order of their
importance ("act-order" with static groups).
"""

from __future__ import annotations

import torch

from transom.formats.rounding import Grid, Rounded, encode, find_grid, values
from transom.formats.schemes import QuantSpec

DAMPING = 0.01
"""Share of the mean diagonal that is added to it: calibration text is finite, so the moments of some columns vanish."""

_COLUMNS = 128
"""Columns whose errors are gathered before the rest of the matrix is corrected: one product in place of many."""


def gptq(weight_RK: torch.Tensor, moments_KK: torch.Tensor, spec: QuantSpec) -> Rounded:
    """Round a matrix so that its products change least.

    Args:
        weight_RK: float32.
        moments_KK: Sum over calibration inputs x of x x^T, float32 or float64.
        spec: The grid's; not one with a scale for the whole tensor.

    Returns:
        Codes of the spec's groups.
    """
    rows, columns = weight_RK.shape
    moments = moments_KK.double()
    diagonal = moments.diagonal()
    moments = moments + torch.eye(columns, dtype=torch.float64) * (DAMPING * diagonal.mean()).clamp(min=1e-12)
    blocks_RGC = weight_RK.view(rows, -1, spec.group(columns))
    grid = find_grid(
        blocks_RGC,
        spec,
        "mse",
        importance_GC=moments.diagonal().float().view(blocks_RGC.shape[1:]),
        tensor_max=float(weight_RK.abs().max()),
    )
    order = moments.diagonal().argsort(descending=True)
    factor_KK = _inverse_factor(moments[order][:, order]).float()
    group_K = torch.arange(columns).div(spec.group(columns), rounding_mode="floor")[order]
    free_RK, rounded_RK = weight_RK[:, order].clone(), torch.empty_like(weight_RK)
    for low in range(0, columns, _COLUMNS):
        high = min(low + _COLUMNS, columns)
        errors = torch.empty(rows, high - low)
        for column in range(low, high):
            place = group_K[column]
            zeros = None if grid.zero_points is None else grid.zero_points[:, place, None]
            here = Grid(divisors=grid.divisors[:, place, None], zero_points=zeros)
            given = free_RK[:, column]
            rounded_R = values(given[:, None, None], here, spec)[:, 0, 0]
            error = (given - rounded_R) / factor_KK[column, column]
            free_RK[:, column:high].addr_(error, factor_KK[column, column:high], alpha=-1)
            rounded_RK[:, column], errors[:, column - low] = rounded_R, error
        free_RK[:, high:].addmm_(errors, factor_KK[low:high, high:], alpha=-1)
    again = torch.empty_like(rounded_RK)
    again[:, order] = rounded_RK
    # What stands on the grid is rounded to itself.
    stored = Grid(divisors=grid.scales(spec), zero_points=grid.zero_points)
    return encode(again.view_as(blocks_RGC), stored, spec)


def _inverse_factor(moments_KK: torch.Tensor) -> torch.Tensor:
    """The upper U with U^T U the inverse: its row i says how an error in column i is spread over those after it.

    From the factor of the moments taken backwards, so that no inverse is ever formed.
    """
    upper_KK = torch.linalg.cholesky(moments_KK.flip(0, 1)).flip(0, 1)
    identity_KK = torch.eye(len(moments_KK), dtype=moments_KK.dtype)
    factor_KK: torch.Tensor = torch.linalg.solve_triangular(upper_KK, identity_KK, upper=True)
    return factor_KK
