"""What layers without attention keep: the last inputs of a convolution, the state of a state space."""

from __future__ import annotations

from typing import Any

import torch

from transom.graphs.ops.operation import differentiate, operation

PIECE = 64
"""Tokens that are scanned at once: within a piece the work grows with their square, from piece to piece in a line."""


def _kept(state: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    """A summary as a call finds it: zeros at position 0, whatever stands there."""
    return state if start is None else torch.where(start == 0, torch.zeros_like(state), state)


@operation
def causal_convolution(
    x_BTC: torch.Tensor,
    before_BLC: torch.Tensor | None,
    start: torch.Tensor | None,
    weight_C1W: torch.Tensor,
    bias_C: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every channel's weighted sum over its last W inputs, in float32; also the last L = W - 1 inputs, to be kept.

    What was kept before position 0, or where nothing is, counts as zeros.
    """
    taps, tokens = weight_C1W.shape[2], x_BTC.shape[1]
    if before_BLC is None:
        before_BLC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    rows = torch.cat((_kept(before_BLC, start), x_BTC), 1)
    total = x_BTC.new_zeros((), dtype=torch.float32) if bias_C is None else bias_C.float()
    for tap in range(taps):
        total = total + rows[:, tap : tap + tokens].float() * weight_C1W[:, 0, tap].float()
    return total.to(x_BTC.dtype), rows[:, tokens:].clone()


@causal_convolution.register_fake
def _(x_BTC: torch.Tensor, _: Any, __: Any, weight_C1W: torch.Tensor, ___: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty((x_BTC.shape[0], weight_C1W.shape[2] - 1, x_BTC.shape[2]))


@operation
def state_space(
    x_BTNH: torch.Tensor,
    steps_BTN: torch.Tensor,
    rates_N: torch.Tensor,
    keys_BTGZ: torch.Tensor,
    queries_BTGZ: torch.Tensor,
    skip_N: torch.Tensor,
    state_BNHZ: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's state space: token by token `state = decay * state + step * x key`, `y = state query + skip x`.

    Source: arXiv 2405.21060, section 6, whose A, B, C, D and dt are -exp(rates), keys, queries, skip and steps; a
    token's decay is `exp(-step * exp(rate))`. All is computed in float32. Heads are split evenly among the G groups.

    Args:
        x_BTNH: Inputs.
        steps_BTN: Time steps, from 0 on; float32.
        rates_N: Logarithms of how fast the heads forget.
        keys_BTGZ: What of the state an input goes to.
        queries_BTGZ: What of the state a token reads.
        skip_N: Share of the input that is added to the result.
        state_BNHZ: Float32 state after the tokens before; None for none.
        start: Position of the first token; the state counts as zeros at position 0.

    Returns:
        [B, T, N, H], and the state after the last token.
    """
    groups = x_BTNH.shape[2] // keys_BTGZ.shape[2]
    x_BNTH, steps_BNT = x_BTNH.float().transpose(1, 2), steps_BTN.float().transpose(1, 2)
    keys_BNTZ, queries_BNTZ = (
        tensor.float().transpose(1, 2).repeat_interleave(groups, 1) for tensor in (keys_BTGZ, queries_BTGZ)
    )
    logs_BNT = steps_BNT * -rates_N.float().exp()[:, None]
    batch, heads, _, width = x_BNTH.shape
    if state_BNHZ is None:
        state_BNHZ = x_BNTH.new_zeros(batch, heads, width, keys_BNTZ.shape[3])
    state_BNHZ = _kept(state_BNHZ, start)
    results = []
    pieces = (torch.split(tensor, PIECE, 2) for tensor in (x_BNTH, steps_BNT, logs_BNT, keys_BNTZ, queries_BNTZ))
    for x, steps, logs, keys, queries in zip(*pieces, strict=True):
        # Sums of what lies between two tokens, not differences of sums, which lose the digits of late small decays.
        between = logs[..., None].expand(*logs.shape, logs.shape[-1]).tril(-1).cumsum(-2)
        decays = between.exp().tril()
        inputs = x * steps[..., None]
        seen = (queries @ keys.mT * decays) @ inputs
        reached = logs.cumsum(-1).exp()[..., None]
        results.append(seen + reached * (queries @ state_BNHZ.mT))
        left = decays[..., -1, :, None]
        state_BNHZ = reached[..., -1:, :] * state_BNHZ + (inputs * left).mT @ keys
    y_BNTH = torch.cat(results, 2) + skip_N.float()[:, None, None] * x_BNTH
    return y_BNTH.transpose(1, 2).to(x_BTNH.dtype).contiguous(), state_BNHZ


@state_space.register_fake
def _(x_BTNH: torch.Tensor, _: Any, __: Any, keys_BTGZ: torch.Tensor, *___: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, width = x_BTNH.shape
    state = x_BTNH.new_empty((batch, heads, width, keys_BTGZ.shape[3]), dtype=torch.float32)
    return x_BTNH.new_empty(x_BTNH.shape), state


differentiate(causal_convolution)
differentiate(state_space)

CAUSAL_CONVOLUTION = torch.ops.transom.causal_convolution.default
STATE_SPACE = torch.ops.transom.state_space.default
