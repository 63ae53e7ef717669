"""What layers without attention keep: the last inputs of a convolution, the state of a state space or a delta rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from transom.graphs.ops.operation import differentiate, operation

PIECE = 64
"""Tokens that are scanned at once: within a piece the work grows with their square, from piece to piece in a line."""

DELTA_PIECE = 16
"""The same of a delta rule, where every channel has decays of its own, so that memory too grows with the square."""

LEAST_NORM = 1e-12
"""What a shorter vector is divided by in place of its length, as `torch.nn.functional.normalize` does."""


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


@operation
def token_shift(
    x_BTC: torch.Tensor, before_B1C: torch.Tensor | None, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every token the row of the one before it; also the last row, to be kept.

    What was kept before position 0, or where nothing is, counts as zeros.
    """
    before_B1C = torch.zeros_like(x_BTC[:, :1]) if before_B1C is None else _kept(before_B1C, start)
    return torch.cat((before_B1C, x_BTC[:, :-1]), 1), x_BTC[:, -1:].clone()


@token_shift.register_fake
def _(x_BTC: torch.Tensor, _: Any, __: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty((x_BTC.shape[0], 1, x_BTC.shape[2]))


@operation
def delta_rule(
    queries_BTNH: torch.Tensor,
    logs_BTNH: torch.Tensor,
    keys_BTNH: torch.Tensor,
    values_BTNV: torch.Tensor,
    removals_BTNH: torch.Tensor,
    rates_BTNH: torch.Tensor,
    state_BNVH: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-7's delta rule: token by token `state = state (diag(w) - u^T (a u)) + v^T k`, `y = state q`.

    Source: arXiv 2503.14456, section 4.1. u is the removal divided by its length, head by head, a the rate and
    w = exp(log). What the state says of u is taken away, as far as the rates say, before the value is put at the key.
    All is computed in float32. A piece of tokens is solved at once: what each finds at its removal depends on what the
    tokens before it found, which is a triangular system (arXiv 2406.06484, section 3, with decays).

    Args:
        queries_BTNH: What of the state a token reads.
        logs_BTNH: Logarithms of the decays, up to 0.
        keys_BTNH: What of the state a value goes to.
        values_BTNV: Inputs.
        removals_BTNH: What of the state is replaced; of any length.
        rates_BTNH: Share of it that is replaced.
        state_BNVH: Float32 state after the tokens before; None for none.
        start: Position of the first token; the state counts as zeros at position 0.

    Returns:
        [B, T, N, V], and the state after the last token.
    """
    q, logs, k, v, u, rates = (
        tensor.float().transpose(1, 2)
        for tensor in (queries_BTNH, logs_BTNH, keys_BTNH, values_BTNV, removals_BTNH, rates_BTNH)
    )
    if state_BNVH is None:
        state_BNVH = v.new_zeros(*v.shape[:2], v.shape[3], k.shape[3])
    state_BNVH = _kept(state_BNVH, start)
    u = nn.functional.normalize(u, dim=-1, eps=LEAST_NORM)
    replaced = u * rates
    results = []
    if q.shape[2] == 1:
        state_BNVH = state_BNVH * logs.exp() - (state_BNVH @ u.mT) @ replaced + v.mT @ k
        results = [q @ state_BNVH.mT]
    else:
        pieces = (torch.split(tensor, DELTA_PIECE, 2) for tensor in (q, logs, k, v, u, replaced))
        for piece in zip(*pieces, strict=True):
            rows, state_BNVH = _solve_piece(state_BNVH, piece)
            results.append(rows)
    return torch.cat(results, 2).transpose(1, 2).to(values_BTNV.dtype).contiguous(), state_BNVH


def _solve_piece(state: torch.Tensor, piece: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Results [B, N, t, V] and state of a few tokens, of which a channel's decays from each to each are at hand."""
    q, logs, k, v, u, replaced = piece
    tokens = q.shape[2]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    # From token s to token t, as sums of what lies between them; to the token before t, for what is there when t comes.
    between = logs[:, :, :, None].masked_fill(~causal.tril(-1)[..., None], 0).cumsum(2)
    decays = between.exp().masked_fill(~causal[..., None], 0)
    earlier = nn.functional.pad(decays[:, :, :-1], (0, 0, 0, 0, 1, 0))
    reached = logs.cumsum(2).exp()
    reached_earlier = nn.functional.pad(reached[:, :, :-1], (0, 0, 1, 0), value=1)

    def scores(rows: torch.Tensor, columns: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return ((columns[:, :, None] * shares) @ rows[..., None]).squeeze(-1)

    # What each token recalls at its removal: (1 + L) recalled = what the state and the values before it put there.
    put = (u * reached_earlier) @ state.mT + scores(u, k, earlier) @ v
    recalled = torch.linalg.solve_triangular(scores(u, replaced, earlier), put, upper=False, unitriangular=True)
    rows = (q * reached) @ state.mT + scores(q, k, decays) @ v - scores(q, replaced, decays) @ recalled
    left = decays[:, :, -1]
    return rows, state * reached[:, :, -1:] + v.mT @ (k * left) - recalled.mT @ (replaced * left)


@delta_rule.register_fake
def _(_: Any, __: Any, keys_BTNH: torch.Tensor, values_BTNV: torch.Tensor, *___: Any) -> tuple[torch.Tensor, Any]:
    batch, _, heads, width = values_BTNV.shape
    state = keys_BTNH.new_empty((batch, heads, width, keys_BTNH.shape[3]), dtype=torch.float32)
    return values_BTNV.new_empty(values_BTNV.shape), state


differentiate(causal_convolution)
differentiate(state_space)
differentiate(token_shift)
differentiate(delta_rule)

CAUSAL_CONVOLUTION = torch.ops.transom.causal_convolution.default
STATE_SPACE = torch.ops.transom.state_space.default
TOKEN_SHIFT = torch.ops.transom.token_shift.default
DELTA_RULE = torch.ops.transom.delta_rule.default
