"""Fused operations, each with a reference body, so that a graph runs in eager PyTorch after every pass.

The bodies are the definition: a lowering is right when it gives the same numbers. Axis letters as in the model files;
a window of 0 means that every earlier key is seen (a global layer).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from transom.formats.quantized import block_of, dequantize
from transom.formats.rounding import FLOAT8, FLOAT8_MAX

_Function = TypeVar("_Function", bound=Callable[..., Any])

BODIES: dict[Any, Callable[..., Any]] = {}
"""Reference body of every fused operation, by the operation as graphs name it."""

_bodies: list[Callable[..., Any]] = []


def _body(function: _Function) -> _Function:
    """Note the body before it becomes an operation, which only the dispatcher can call."""
    _bodies.append(function)
    return function


def slot_positions(start: torch.Tensor | int, tokens: int, slots: int) -> torch.Tensor:
    """Position that each cache slot holds after `tokens` new ones were written, int64 [S]; negative means empty.

    Position p stands in slot p % S, so slot j holds `last - (last - j) % S`.
    """
    last = start + tokens - 1
    return last - (last - torch.arange(slots)) % slots


def visible(
    start: torch.Tensor | int, tokens: int, slots: int, window: int, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Which slots each new token sees, bool [T, S]; see `seen`."""
    return seen(slot_positions(start, tokens, slots), start + torch.arange(tokens), window, until_T)


def seen(
    keys_S: torch.Tensor, positions_T: torch.Tensor, window: int, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Which keys each query sees, bool [T, S]: `0 <= key <= until`, and `position - key < window` if local.

    Args:
        keys_S: Positions of the keys; negative means empty.
        positions_T: Positions of the queries.
        window: Keys that a query sees, itself included; 0 for every earlier one.
        until_T: Last position that each query sees: the end of the image that it belongs to; None for its own.
    """
    last_T = positions_T if until_T is None else until_T
    seen_TS = (keys_S >= 0) & (keys_S <= last_T[:, None])
    return seen_TS & (positions_T[:, None] - keys_S < window) if window else seen_TS


@torch.library.custom_op("transom::rms_norm", mutates_args=())
@_body
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x) * weight` over the last axis, computed in float32 (a `1 + w` norm has its 1 folded in)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("transom::add_rms_norm", mutates_args=())
@_body
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`total = x + residual`; returns `rms_norm(total)` and `total`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


@add_rms_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("transom::rotary", mutates_args=())
@_body
def rotary(
    x: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor, heads_first: bool, interleaved: bool = False
) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + H/2]), or (x[2 i], x[2 i + 1]) if `interleaved`.

    `x` is [B, N, T, H] if `heads_first`, else [B, T, N, H]; cosines and sines are [T, H / 2], and the sums are taken in
    their dtype.
    """
    cos, sin = (cos_TH, sin_TH) if heads_first else (cos_TH[:, None], sin_TH[:, None])
    low, high = x.view(*x.shape[:-1], -1, 2).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = low * cos - high * sin, high * cos + low * sin
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)


@rotary.register_fake
def _(
    x: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor, heads_first: bool, interleaved: bool = False
) -> torch.Tensor:
    return x.new_empty(x.shape)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
"""Activations of gated MLPs, by name."""

SWIGLU_SLOPE, SWIGLU_LIMIT = 1.702, 7.0
CLAMPED_SWIGLU = "clamped_swiglu"
"""`(up + 1) * gate * sigmoid(SWIGLU_SLOPE * gate)`, where gates are `SWIGLU_LIMIT` at most, and ups that or less in
magnitude: how experts of gpt-oss are gated."""


@torch.library.custom_op("transom::gated", mutates_args=())
@_body
def gated(packed: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate) * up` of a packed projection [..., 2 F] whose first half is the gate; see `ACTIVATIONS`."""
    gate, up = packed.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@gated.register_fake
def _(packed: torch.Tensor, activation: str) -> torch.Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


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


@torch.library.custom_op("transom::experts", mutates_args=())
@_body
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
def _(
    x: torch.Tensor,
    choices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("transom::experts_quantized", mutates_args=())
@_body
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
def _(
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
    return x.new_empty(x.shape)


@torch.library.custom_op("transom::write_cache", mutates_args=())
@_body
def write_cache(cache_BKSH: torch.Tensor, new: torch.Tensor, start: torch.Tensor, *, heads_first: bool) -> torch.Tensor:
    """Write position p into slot p % S; of more tokens than slots, the last ones stay.

    `new` is [B, K, T, H] if `heads_first`, else [B, T, K, H]; its tokens stand at `start`, `start + 1`, and so on.
    """
    new_BKTH = new if heads_first else new.transpose(1, 2)
    slots, tokens = cache_BKSH.shape[2], new_BKTH.shape[2]
    steps = torch.arange(max(0, tokens - slots), tokens)
    return cache_BKSH.index_copy(2, (start + steps) % slots, new_BKTH[:, :, steps])


@write_cache.register_fake
def _(cache_BKSH: torch.Tensor, new: torch.Tensor, start: torch.Tensor, *, heads_first: bool) -> torch.Tensor:
    return torch.empty_like(cache_BKSH)


@torch.library.custom_op("transom::attention", mutates_args=())
@_body
def attention(
    q_BNTH: torch.Tensor,
    k_BKSH: torch.Tensor,
    v_BKSH: torch.Tensor,
    start: torch.Tensor | None,
    until: torch.Tensor | None = None,
    sinks_N: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend over slots that the new tokens were written to (or, with `start` None, over the new tokens themselves).

    Returns [B, N, T, H]. A local layer needs `window + T - 1` slots: the last new token overwrites what the first one
    would see in a smaller ring. `until` [T] is the last position that each token sees, a new one; None for its own.
    Scores become `softcap * tanh(scores / softcap)` before the mask; 0 for no cap. `sinks_N` are scores of one more key
    per query head, which every token sees and which has no value.
    """
    seen_TS = visible(0 if start is None else start, q_BNTH.shape[2], k_BKSH.shape[2], window, until)
    return _weighted_values(q_BNTH, k_BKSH, v_BKSH, seen_TS, scale, softcap, sinks_N)


def _weighted_values(
    q_BNTH: torch.Tensor,
    k_BKSH: torch.Tensor,
    v_BKSH: torch.Tensor,
    seen_TS: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = k_BKSH.repeat_interleave(groups, 1), v_BKSH.repeat_interleave(groups, 1)
    if q_BNTH.dtype == torch.float16:  # which may not hold a product of queries and keys before its scale
        q_BNTH, k_BNSH = q_BNTH.float(), k_BNSH.float()
    scores_BNTS = (q_BNTH @ k_BNSH.transpose(2, 3) * scale).float()
    if softcap:
        scores_BNTS = torch.tanh(scores_BNTS / softcap) * softcap
    if seen_TS is not None:
        scores_BNTS = scores_BNTS.masked_fill(~seen_TS, float("-inf"))
    if sinks_N is not None:
        sinks_BNT1 = sinks_N.float()[:, None, None].expand(*scores_BNTS.shape[:3], 1)
        scores_BNTS = torch.cat((scores_BNTS, sinks_BNT1), -1)
    weights_BNTS = scores_BNTS.softmax(-1)[..., : v_BNSH.shape[2]]
    return weights_BNTS.to(v_BNSH.dtype) @ v_BNSH


@attention.register_fake
def _(
    q_BNTH: torch.Tensor,
    k_BKSH: torch.Tensor,
    v_BKSH: torch.Tensor,
    start: torch.Tensor | None,
    until: torch.Tensor | None = None,
    sinks_N: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    return q_BNTH.new_empty((*q_BNTH.shape[:3], v_BKSH.shape[3]))


@torch.library.custom_op("transom::full_attention", mutates_args=())
@_body
def full_attention(q_BNTH: torch.Tensor, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attend over all keys, without caches or a mask, as encoders of images do. Returns [B, N, T, H]."""
    return _weighted_values(q_BNTH, k_BNSH, v_BNSH, None, scale)


@full_attention.register_fake
def _(q_BNTH: torch.Tensor, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor, *, scale: float) -> torch.Tensor:
    return q_BNTH.new_empty((*q_BNTH.shape[:3], v_BNSH.shape[3]))


@torch.library.custom_op("transom::attend", mutates_args=())
@_body
def attend(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    k_cache_BKSH: torch.Tensor,
    v_cache_BKSH: torch.Tensor,
    start: torch.Tensor,
    until: torch.Tensor | None = None,
    sinks_N: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend over caches as they were before the new tokens, and over the new tokens. Returns [B, T, N, H].

    A local layer needs `window` slots, however long the chunk: nothing is overwritten that a token still sees. `until`
    [T] is the last position that each token sees, a new one; None for its own. Soft caps and sinks are those of
    `attention`.
    """
    k_BKTH, v_BKTH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
    tokens, slots = k_BKTH.shape[2], k_cache_BKSH.shape[2]
    positions_T = start + torch.arange(tokens)
    keys_J = torch.cat((slot_positions(start, 0, slots), positions_T))
    seen_TJ = seen(keys_J, positions_T, window, until)
    k_BKJH, v_BKJH = torch.cat((k_cache_BKSH, k_BKTH), 2), torch.cat((v_cache_BKSH, v_BKTH), 2)
    out_BNTH = _weighted_values(q_BTNH.transpose(1, 2), k_BKJH, v_BKJH, seen_TJ, scale, softcap, sinks_N)
    return out_BNTH.transpose(1, 2).contiguous()


@attend.register_fake
def _(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    k_cache_BKSH: torch.Tensor,
    v_cache_BKSH: torch.Tensor,
    start: torch.Tensor,
    until: torch.Tensor | None = None,
    sinks_N: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
) -> torch.Tensor:
    return q_BTNH.new_empty((*q_BTNH.shape[:3], v_BTKH.shape[3]))


@torch.library.custom_op("transom::linear_quantized", mutates_args=())
@_body
def linear_quantized(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str
) -> torch.Tensor:
    """`x @ dequantize(codes).T`; see `formats.quantized` for the layout of codes, zero points and offsets."""
    return torch.nn.functional.linear(x, dequantize(codes, scales, zeros, format).to(x.dtype))


@linear_quantized.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("transom::embedding_quantized", mutates_args=())
@_body
def embedding_quantized(
    tokens: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str
) -> torch.Tensor:
    """Rows of the dequantised table, float32 [..., K]."""
    flat = tokens.flatten()
    rows = dequantize(codes[flat], scales[flat], None if zeros is None else zeros[flat], format)
    return rows.view(*tokens.shape, -1)


@embedding_quantized.register_fake
def _(
    tokens: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, format: str
) -> torch.Tensor:
    return scales.new_empty((*tokens.shape, codes.shape[1] * block_of(codes, format)))


@torch.library.custom_op("transom::round_activations", mutates_args=())
@_body
def round_activations(x: torch.Tensor, scale: float, format: str) -> torch.Tensor:
    """Round activations to 8-bit floats and back: `x / scale` to the nearest of them, what is out of range clamped."""
    if format != "float8_e4m3fn":
        raise ValueError(f"activations are rounded to float8_e4m3fn, not to {format!r}")
    narrow = (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return (narrow.float() * scale).to(x.dtype)


@round_activations.register_fake
def _(x: torch.Tensor, scale: float, format: str) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("transom::causal_convolution", mutates_args=())
@_body
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
def _(
    x_BTC: torch.Tensor,
    before_BLC: torch.Tensor | None,
    start: torch.Tensor | None,
    weight_C1W: torch.Tensor,
    bias_C: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty((x_BTC.shape[0], weight_C1W.shape[2] - 1, x_BTC.shape[2]))


def _kept(state: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    """A summary as a call finds it: zeros at position 0, whatever stands there."""
    return state if start is None else torch.where(start == 0, torch.zeros_like(state), state)


PIECE = 64
"""Tokens that are scanned at once: within a piece the work grows with their square, from piece to piece in a line."""


@torch.library.custom_op("transom::state_space", mutates_args=())
@_body
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
def _(
    x_BTNH: torch.Tensor,
    steps_BTN: torch.Tensor,
    rates_N: torch.Tensor,
    keys_BTGZ: torch.Tensor,
    queries_BTGZ: torch.Tensor,
    skip_N: torch.Tensor,
    state_BNHZ: torch.Tensor | None,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, width = x_BTNH.shape
    state = x_BTNH.new_empty((batch, heads, width, keys_BTGZ.shape[3]), dtype=torch.float32)
    return x_BTNH.new_empty(x_BTNH.shape), state


def _differentiate(operation: Any, body: Callable[..., Any]) -> None:
    """Let an operation that models call have gradients: those of its body, run once more."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        values = [
            None if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())
            for tensor in ctx.saved_tensors
        ]
        with torch.enable_grad():
            results = body(*values)
        pairs = [pair for pair in zip(results, gradients, strict=True) if pair[1] is not None]
        wanted = [value for value in values if value is not None and value.requires_grad]
        sources, weights = zip(*pairs, strict=True)
        computed = iter(torch.autograd.grad(sources, wanted, weights, allow_unused=True))
        return tuple(next(computed) if value is not None and value.requires_grad else None for value in values)

    operation.register_autograd(backward, setup_context=save)


# The operations as graphs name them.
RMS_NORM = torch.ops.transom.rms_norm.default
ADD_RMS_NORM = torch.ops.transom.add_rms_norm.default
ROTARY = torch.ops.transom.rotary.default
GATED = torch.ops.transom.gated.default
EXPERTS = torch.ops.transom.experts.default
EXPERTS_QUANTIZED = torch.ops.transom.experts_quantized.default
WRITE_CACHE = torch.ops.transom.write_cache.default
ATTENTION = torch.ops.transom.attention.default
FULL_ATTENTION = torch.ops.transom.full_attention.default
ATTEND = torch.ops.transom.attend.default
LINEAR_QUANTIZED = torch.ops.transom.linear_quantized.default
EMBEDDING_QUANTIZED = torch.ops.transom.embedding_quantized.default
ROUND_ACTIVATIONS = torch.ops.transom.round_activations.default
CAUSAL_CONVOLUTION = torch.ops.transom.causal_convolution.default
STATE_SPACE = torch.ops.transom.state_space.default

BODIES |= {getattr(torch.ops.transom, function.__name__).default: function for function in _bodies}

_differentiate(causal_convolution, BODIES[CAUSAL_CONVOLUTION])
_differentiate(state_space, BODIES[STATE_SPACE])
