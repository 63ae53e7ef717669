"""Mixtures of experts: a router chooses a few gated MLPs for every token (arXiv 2101.03961).

What stands here is the textbook: every expert sees every token, and the share of those that were not chosen is zero.
`passes.fuse_experts` recognises it, and then only the chosen ones are computed.

The experts' matrices stand one below the other, so that they are quantised, stored and read by rows as any matrix is.

Axes:
    B  batch            T  new tokens        M  tokens of all rows     D  model width
    E  experts          C  chosen ones       F  width of an expert
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from transom.graphs.ops import SWIGLU_LIMIT, SWIGLU_SLOPE
from transom.zoo.layers import Activation

Gate = Callable[[torch.Tensor], torch.Tensor]
"""`[..., 2 F] -> [..., F]`, of gates and, behind them, ups."""


def gated(activation: Activation) -> Gate:
    """`activation(gate) * up` (arXiv 2002.05202)."""

    def gate(packed: torch.Tensor) -> torch.Tensor:
        gates, ups = packed.chunk(2, dim=-1)
        return activation(gates) * ups

    return gate


def clamped_swiglu(packed: torch.Tensor) -> torch.Tensor:
    """`(up + 1) * gate * sigmoid(1.702 gate)`, where gates are 7 at most and ups lie within -7 and 7.

    Source: the reference implementation of gpt-oss, `swiglu`.
    """
    gates, ups = packed.chunk(2, dim=-1)
    gates = gates.clamp(max=SWIGLU_LIMIT)
    ups = ups.clamp(min=-SWIGLU_LIMIT, max=SWIGLU_LIMIT)
    return (ups + 1) * (gates * torch.sigmoid(gates * SWIGLU_SLOPE))


def route(logits_BTE: torch.Tensor, chosen: int, *, normalized: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of the largest logits.

    Args:
        logits_BTE: Of the router.
        chosen: Experts of each token.
        normalized: Whether the weights of the chosen ones add up to 1, as a softmax over their logits gives them;
            otherwise they are those of a softmax over all.

    Returns:
        Which, int64 [B, T, C], and their weights [B, T, C] in the logits' dtype.
    """
    if normalized:
        logits_BTC, choices_BTC = logits_BTE.topk(chosen, dim=-1)
        return choices_BTC, logits_BTC.float().softmax(-1).type_as(logits_BTE)
    weights_BTC, choices_BTC = logits_BTE.float().softmax(-1).topk(chosen, dim=-1)
    return choices_BTC, weights_BTC.type_as(logits_BTE)


class Experts(nn.Module):
    """`sum over chosen experts of weight * down(gate(gate_up(x)))`.

    Rows of `gate_up_proj` [E * 2 F, D] are each expert's gates, then its ups; `down_proj` is [E * D, F]. Biases, if
    there are any, have a number for each of these rows.

    Args:
        experts: How many.
        hidden_size: D.
        intermediate_size: F.
        gate: What becomes of gates and ups.
        biases: Whether there are biases.
    """

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int, gate: Gate, *, biases: bool) -> None:
        super().__init__()
        E, D, F = experts, hidden_size, intermediate_size
        self.sizes, self.gate = (E, D, F), gate
        self.gate_up_proj = nn.Parameter(torch.empty(E * 2 * F, D))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E * 2 * F)) if biases else None
        self.down_proj = nn.Parameter(torch.empty(E * D, F))
        self.down_proj_bias = nn.Parameter(torch.empty(E * D)) if biases else None

    def forward(self, x_BTD: torch.Tensor, choices_BTC: torch.Tensor, weights_BTC: torch.Tensor) -> torch.Tensor:
        """Run the chosen experts.

        Args:
            x_BTD: Activations.
            choices_BTC: Of every token, int64.
            weights_BTC: Of the chosen ones.
        """
        E, D, F = self.sizes
        B, T, _ = x_BTD.shape
        shares_BTE = x_BTD.new_zeros(B, T, E).scatter(-1, choices_BTC, weights_BTC)
        packed_BTEF = nn.functional.linear(x_BTD, self.gate_up_proj, self.gate_up_proj_bias).view(B, T, E, 2 * F)
        hidden_EMF = self.gate(packed_BTEF).permute(2, 0, 1, 3).reshape(E, B * T, F)
        out_EMD = hidden_EMF @ self.down_proj.view(E, D, F).transpose(1, 2)
        if self.down_proj_bias is not None:
            out_EMD = out_EMD + self.down_proj_bias.view(E, 1, D)
        out_BTED = out_EMD.view(E, B, T, D).permute(1, 2, 0, 3)
        return (out_BTED * shares_BTE.unsqueeze(-1)).sum(2)
