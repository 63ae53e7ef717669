"""Attention over new tokens, over caches, and over both."""

from __future__ import annotations

from typing import Any

import torch

from transom.graphs.ops.mask import Mask
from transom.graphs.ops.operation import operation


def slot_positions(start: torch.Tensor | int, tokens: int, slots: int) -> torch.Tensor:
    """Position that each cache slot holds after `tokens` new ones were written, int64 [S]; negative means empty.

    Position p stands in slot p % S, so slot j holds `last - (last - j) % S`.
    """
    last = start + tokens - 1
    return last - (last - torch.arange(slots)) % slots


def visible(
    start: torch.Tensor | int, tokens: int, slots: int, mask: Mask, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Which slots each new token sees, bool [T, S]; see `seen`."""
    return seen(slot_positions(start, tokens, slots), start + torch.arange(tokens), mask, until_T)


def seen(
    keys_S: torch.Tensor, positions_T: torch.Tensor, mask: Mask, until_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Which keys each query sees, bool [T, S]: `0 <= key <= until`, and what the mask says.

    Args:
        keys_S: Positions of the keys; negative means empty.
        positions_T: Positions of the queries.
        mask: Which of the earlier keys.
        until_T: Last position that each query sees: the end of the image that it belongs to; None for its own.
    """
    last_T = positions_T if until_T is None else until_T
    seen_TS = (keys_S >= 0) & (keys_S <= last_T[:, None])
    for condition_TS in mask.conditions(positions_T[:, None], keys_S):
        seen_TS = seen_TS & condition_TS
    return seen_TS


@operation
def write_cache(cache_BKSH: torch.Tensor, new: torch.Tensor, start: torch.Tensor, *, heads_first: bool) -> torch.Tensor:
    """Write position p into slot p % S; of more tokens than slots, the last ones stay.

    `new` is [B, K, T, H] if `heads_first`, else [B, T, K, H]; its tokens stand at `start`, `start + 1`, and so on.
    """
    new_BKTH = new if heads_first else new.transpose(1, 2)
    slots, tokens = cache_BKSH.shape[2], new_BKTH.shape[2]
    steps = torch.arange(max(0, tokens - slots), tokens)
    return cache_BKSH.index_copy(2, (start + steps) % slots, new_BKTH[:, :, steps])


@write_cache.register_fake
def _(cache_BKSH: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(cache_BKSH)


@operation
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
    segment: int = 0,
    dilation: int = 1,
) -> torch.Tensor:
    """Attend over slots that the new tokens were written to (or, with `start` None, over the new tokens themselves).

    Returns [B, N, T, H]. What a token sees is said by `window`, `segment` and `dilation`, as in `Mask`. A local layer
    needs `reach + T - 1` slots: the last new token overwrites what the first one would see in a smaller ring. `until`
    [T] is the last position that each token sees, a new one; None for its own.
    Scores become `softcap * tanh(scores / softcap)` before the mask; 0 for no cap. `sinks_N` are scores of one more key
    per query head, which every token sees and which has no value.
    """
    mask = Mask(window=window, segment=segment, dilation=dilation)
    seen_TS = visible(0 if start is None else start, q_BNTH.shape[2], k_BKSH.shape[2], mask, until)
    return _weighted_values(q_BNTH, k_BKSH, v_BKSH, seen_TS, scale, softcap, sinks_N)


@attention.register_fake
def _(q_BNTH: torch.Tensor, _: torch.Tensor, v_BKSH: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
    return q_BNTH.new_empty((*q_BNTH.shape[:3], v_BKSH.shape[3]))


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


@operation
def full_attention(q_BNTH: torch.Tensor, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Attend over all keys, without caches or a mask, as encoders of images do. Returns [B, N, T, H]."""
    return _weighted_values(q_BNTH, k_BNSH, v_BNSH, None, scale)


@full_attention.register_fake
def _(q_BNTH: torch.Tensor, _: torch.Tensor, v_BNSH: torch.Tensor, **__: Any) -> torch.Tensor:
    return q_BNTH.new_empty((*q_BNTH.shape[:3], v_BNSH.shape[3]))


@operation
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
    segment: int = 0,
    dilation: int = 1,
) -> torch.Tensor:
    """Attend over caches as they were before the new tokens, and over the new tokens. Returns [B, T, N, H].

    A local layer needs `reach` slots, however long the chunk: nothing is overwritten that a token still sees. `until`
    [T] is the last position that each token sees, a new one; None for its own. Masks, soft caps and sinks are those of
    `attention`.
    """
    k_BKTH, v_BKTH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
    tokens, slots = k_BKTH.shape[2], k_cache_BKSH.shape[2]
    positions_T = start + torch.arange(tokens)
    keys_J = torch.cat((slot_positions(start, 0, slots), positions_T))
    seen_TJ = seen(keys_J, positions_T, Mask(window=window, segment=segment, dilation=dilation), until)
    k_BKJH, v_BKJH = torch.cat((k_cache_BKSH, k_BKTH), 2), torch.cat((v_cache_BKSH, v_BKTH), 2)
    out_BNTH = _weighted_values(q_BTNH.transpose(1, 2), k_BKJH, v_BKJH, seen_TJ, scale, softcap, sinks_N)
    return out_BNTH.transpose(1, 2).contiguous()


@attend.register_fake
def _(q_BTNH: torch.Tensor, _: torch.Tensor, v_BTKH: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
    return q_BTNH.new_empty((*q_BTNH.shape[:3], v_BTKH.shape[3]))


WRITE_CACHE = torch.ops.transom.write_cache.default
ATTENTION = torch.ops.transom.attention.default
FULL_ATTENTION = torch.ops.transom.full_attention.default
ATTEND = torch.ops.transom.attend.default
