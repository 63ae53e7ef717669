"""What may be wrong with attention: the window, the cache, or the scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from transom.validation.bisection.evidence import RIGHT, Evidence, Hypothesis

SCANNED = 256
"""Up to this many positions, every number of slots and every window is tried; beyond, the likely ones."""


class _Keys(NamedTuple):
    """Which keys each token may see, [T, T] each, positions of queries first."""

    distance: torch.Tensor
    """How far back a key is; negative for later ones."""
    same_call: torch.Tensor
    lost: torch.Tensor
    """How many newer keys have been written when the token attends: its call's last position less the key's."""
    before: torch.Tensor
    """The same, counted before the call writes: its first position less 1 less the key's; negative in the call."""


def of_attention(evidence: Evidence) -> Iterator[Hypothesis]:
    """Windows, overwritten keys, scales."""
    config, layer, at = evidence.context.config, evidence.site.layer, evidence.positions
    assert layer is not None
    window, scale = config.layers[layer].window, config.attention_scale
    starts = torch.cat([torch.full((count,), start) for start, count in evidence.calls])
    lasts = torch.cat([torch.full((count,), start + count - 1) for start, count in evidence.calls])
    keys = _Keys(
        distance=at[:, None] - at,
        same_call=starts[:, None] == starts,
        lost=lasts[:, None] - at,
        before=starts[:, None] - 1 - at,
    )
    causal = keys.distance >= 0
    blocks = _blocks(evidence)
    seen = causal | blocks
    if window is not None:
        seen = seen & (keys.distance < window)

    def guess(op: str, cause: str, seen: torch.Tensor = seen, scale: float = scale) -> Hypothesis:
        return Hypothesis(op=op, cause=cause, predict=lambda: attend(evidence, seen, scale))

    yield guess("mask", RIGHT)
    for cause, changed in _masks(keys, window, config.window, blocks):
        yield guess("mask", cause, changed)
        for cached in _cached_keys(evidence, keys, window):
            if not torch.equal(changed & cached, changed):
                yield guess("mask", f"{cause}, as far as its cache holds them", changed & cached)
    yield from (guess("cache write", cause, kept) for cause, kept in _losses(evidence, keys, seen, window))
    for shift, words in ((1, "before"), (-1, "after")):
        yield Hypothesis(
            op="cache write",
            cause=f"keys and values stand one slot off: every token reads those of the position {words}",
            predict=lambda shift=shift: attend(evidence, seen, scale, shift=shift),  # type: ignore[misc]
        )
    yield Hypothesis(
        op="mask",
        cause="slots that were never written are seen as keys of zeros",
        predict=lambda: attend(evidence, seen, scale, empty=window or int(lasts.max()) + 1),
    )
    yield Hypothesis(
        op="mask",
        cause="query heads read the wrong key/value heads: they are tiled, not repeated",
        predict=lambda: attend(evidence, seen, scale, tiled=True),
    )
    for cause, wrong in (
        ("head_dim ** -0.5", config.head_dim**-0.5),
        ("1: the scores are not scaled", 1.0),
        ("applied twice", scale * scale),
        ("hidden_size ** -0.5", config.hidden_size**-0.5),
    ):
        if wrong != scale:
            yield guess("softmax", f"the softmax scale is {cause} ({wrong:.6g} in place of {scale:.6g})", scale=wrong)
    for cap in (30.0, 50.0):
        yield Hypothesis(
            op="softmax",
            cause=f"the scores are capped at {cap:g}",
            predict=lambda cap=cap: attend(evidence, seen, scale, cap=cap),  # type: ignore[misc]
        )
    fitted = _fit_scale(evidence, seen, scale)
    yield guess("softmax", f"the softmax scale is {fitted:.4g} in place of {scale:.4g}", scale=fitted)


def _blocks(evidence: Evidence) -> torch.Tensor:
    """Pairs of positions of one block that sees itself, bool [T, T]."""
    at = evidence.positions
    same_block = torch.zeros(len(at), len(at), dtype=torch.bool)
    for first, stop in evidence.context.blocks:
        inside = (at >= first) & (at < stop)
        same_block |= inside[:, None] & inside
    return same_block


def _masks(keys: _Keys, window: int | None, local: int, blocks: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Masks that are not the layer's."""
    causal = keys.distance >= 0
    if window is not None:
        for wrong in (window - 1, window + 1):
            words = f"the window is off by one: {wrong} keys in place of {window}"
            yield words, (causal | blocks) & (keys.distance < wrong)
        yield "the window is ignored: the local layer sees every earlier key", causal | blocks
        reach = len(causal) if len(causal) <= SCANNED else 0
        for wrong in sorted({window // 2, 2 * window, *range(1, reach)} - {window - 1, window, window + 1}):
            words = f"the window is {wrong} keys in place of {window}"
            yield words, (causal | blocks) & (keys.distance < wrong)
        in_window = keys.distance < window
    else:
        words = f"the global layer is bounded to the window of {local} keys: its mask is a local layer's"
        yield words, (causal | blocks) & (keys.distance < local)
        for wrong in range(1, len(causal) if len(causal) <= SCANNED else 0):
            words = f"the global layer is bounded to a window of {wrong} keys"
            yield words, (causal | blocks) & (keys.distance < wrong)
        in_window = torch.ones_like(causal)
    yield "attention is not causal: tokens see later ones of their call", (causal | keys.same_call) & in_window
    yield "tokens see one key too late a position", (keys.distance >= -1) & (causal | keys.same_call) & in_window
    yield "tokens do not see their own key", (keys.distance >= 1) & in_window
    if blocks.any():
        yield "the image block is missing: its tokens see only earlier ones", causal & in_window


def _cached_keys(evidence: Evidence, keys: _Keys, window: int | None) -> Iterator[torch.Tensor]:
    """What rightly bounded caches of a local layer hold: written before attention, and after it."""
    if window is not None:
        yield keys.lost < window + max(count for _, count in evidence.calls) - 1
        yield keys.same_call | (keys.before < window)


def _losses(
    evidence: Evidence, keys: _Keys, seen: torch.Tensor, window: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Keys that attention should see and that no longer stand in the cache."""
    local, chunk = evidence.context.config.window, max(count for _, count in evidence.calls)
    kind = "local" if window is not None else "global"
    needed = f"{local + chunk - 1} are needed for a window of {local} and chunks of {chunk}"
    needed = needed if window is not None else "it must grow with the context"
    likely = [local, local - 1, local + 1, local + chunk - 2, local + chunk - 1, chunk]
    scanned = range(1, local + 2 * chunk) if len(seen) <= SCANNED else ()
    for slots in dict.fromkeys((*likely, *scanned)):
        words = f"the {kind} layer's cache has {slots} slots, {needed}: keys were overwritten before they were read"
        yield words, seen & (keys.lost < slots)
    for slots in dict.fromkeys((*likely, *scanned)):
        if window is None or slots < window:
            words = f"the {kind} layer's cache keeps {slots} keys between calls: those before them are missing"
            yield words, seen & (keys.same_call | (keys.before < slots))
    yield "keys of earlier calls are missing: the cache is not kept, or not read", seen & keys.same_call
    yield (
        "keys of the same call are missing: they are written after attention",
        seen & (~keys.same_call | (keys.distance == 0)),
    )


def attend(
    evidence: Evidence,
    seen_TS: torch.Tensor,
    scale: float,
    *,
    shift: int = 0,
    empty: int = 0,
    tiled: bool = False,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention of a whole run at once, [T, N * H]; NaN for a token that sees nothing.

    Args:
        evidence: The run.
        seen_TS: Which keys each token sees.
        scale: Factor on the scores.
        shift: Positions by which keys and values are displaced.
        empty: Keys that a token sees at least; those that are missing are zeros.
        tiled: Whether query head n reads kv head n % K in place of n // (N / K).
        cap: Cap of the scores.
    """
    q_TNH, k_TKH, v = evidence.inputs
    v_TKH = v.view(k_TKH.shape)
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    heads = (x.roll(shift, 0) for x in (k_TKH, v_TKH))
    k_TNH, v_TNH = (x.repeat(1, groups, 1) if tiled else x.repeat_interleave(groups, 1) for x in heads)
    scores_NTS = torch.einsum("tnh,snh->nts", q_TNH, k_TNH) * scale
    if cap is not None:
        scores_NTS = torch.tanh(scores_NTS / cap) * cap
    scores_NTS = scores_NTS.masked_fill(~seen_TS, float("-inf"))
    if empty:
        missing_T = (empty - seen_TS.sum(1)).clamp_min(0).float()
        zeros_NT1 = missing_T.log()[None, :, None].expand(len(scores_NTS), -1, 1)
        scores_NTS = torch.cat((scores_NTS, zeros_NT1), -1)
    weights_NTS = scores_NTS.softmax(-1)[..., : seen_TS.shape[1]]
    return torch.einsum("nts,snh->tnh", weights_NTS, v_TNH).flatten(1)


def _fit_scale(evidence: Evidence, seen: torch.Tensor, scale: float) -> float:
    """The factor on the scores that comes closest to the output, by golden-section search on its logarithm."""

    def loss(power: float) -> float:
        errors = (attend(evidence, seen, scale * 2**power) - evidence.output).double().pow(2)
        return float(errors.nan_to_num(0.0).sum())

    # The loss has one valley near the best of a coarse grid.
    grid = [step / 2 for step in range(-12, 13)]
    best = min(grid, key=loss)
    low, high, ratio = best - 0.5, best + 0.5, (5**0.5 - 1) / 2
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(scale * 2 ** ((low + high) / 2))
