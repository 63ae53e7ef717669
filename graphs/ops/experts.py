"""The chosen ones of many gated MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from transom.formats.quantized import block_of, dequantize
from transom.graphs.ops.layers import ACTIVATIONS
from transom.graphs.ops.operation import operation

SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0
CLAMPED_SWIGLU = "clamped_swiglu"
"""`(up + 1) * gate * sigmoid(SWIGLU_SLOPE * gate)`, where gates are `SWIGLU_LIMIT` at most, and ups that or less in
magnitude: how experts of gpt-oss are gated."""


def _apply_gate(packed: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = packed.chunk(2, dim=-1)
    if activation != CLAMPED_SWIGLU:
        return ACTIVATIONS[activation](gate) * up
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * SWIGLU_SLOPE))


def _chosen_experts(
    x: torch.Tensor,
    choices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Callable[[int], torch.Tensor],
    down: Callable[[int], torch.Tensor],
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """See `experts`; the matrices are functions from an expert to its own."""
    flat, total = x.flatten(0, -2), torch.zeros(x.shape, dtype=torch.float32).flatten(0, -2)
    chosen, shares = choices.flatten(0, -2), weights.flatten(0, -2)
    for expert in torch.unique(chosen).tolist():
        share = torch.where(chosen == expert, shares, 0).sum(-1)
        tokens = (chosen == expert).any(-1).nonzero()[:, 0]
        first, second = gate_up(expert).to(x.dtype), down(expert).to(x.dtype)
        biases = [
            None if bias is None else bias[expert * len(matrix) : (expert + 1) * len(matrix)]
            for bias, matrix in ((gate_up_bias, first), (down_bias, second))
        ]
        hidden = _apply_gate(torch.nn.functional.linear(flat[tokens], first, biases[0]), activation)
        total[tokens] += (torch.nn.functional.linear(hidden, second, biases[1]) * share[tokens, None]).float()
    return total.view(x.shape).to(x.dtype)


@operation
def experts(
    x: torch.Tensor,
    choices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """The sum over the chosen experts of `weight * down(gate(gate_up(x)))`, [..., D].

    Args:
        x: [..., D].
        choices: Experts of each row, int64 [..., C], each once.
        weights: Of the chosen experts, [..., C].
        gate_up: Matrices [E * 2 F, D] of all experts, one below the other: gates, then ups.
        down: The same that lead back, [E * D, F].
        gate_up_bias: [E * 2 F].
        down_bias: [E * D].
        activation: Of `ACTIVATIONS`, or `CLAMPED_SWIGLU`.
    """
    width, rows = x.shape[-1], 2 * down.shape[1]
    return _chosen_experts(
        x,
        choices,
        weights,
        lambda expert: gate_up[expert * rows : (expert + 1) * rows],
        lambda expert: down[expert * width : (expert + 1) * width],
        gate_up_bias,
        down_bias,
        activation,
    )


@experts.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@operation
def experts_quantized(
    x: torch.Tensor,
    choices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_zeros: torch.Tensor | None,
    gate_up_format: str,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    down_zeros: torch.Tensor | None,
    down_format: str,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """`experts` with the matrices as codes; see `formats.quantized` for the layout."""

    def matrix(rows: int, codes: Any, scales: Any, zeros: Any, format: str) -> Callable[[int], torch.Tensor]:
        def read(expert: int) -> torch.Tensor:
            place = slice(expert * rows, (expert + 1) * rows)
            return dequantize(codes[place], scales[place], None if zeros is None else zeros[place], format)

        return read

    width, hidden = x.shape[-1], down.shape[1] * block_of(down, down_format)
    first = matrix(2 * hidden, gate_up, gate_up_scales, gate_up_zeros, gate_up_format)
    second = matrix(width, down, down_scales, down_zeros, down_format)
    return _chosen_experts(x, choices, weights, first, second, gate_up_bias, down_bias, activation)


@experts_quantized.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


EXPERTS = torch.ops.transom.experts.default
EXPERTS_QUANTIZED = torch.ops.transom.experts_quantized.default
