"""`transom.gated_attention`: attention whose window is a mixture, so that a loss can choose among several.

The result is the mean of attention within each window, by `softmax(gates)`; with all of it on one window, attention
within that one. Shares do not fall on scores, as in adaptive attention span (arXiv 1905.07799): scores would grow to
make up for a small share, and the loss would not tell that a window is needed before it is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.library.custom_op("transom::gated_attention", mutates_args=())
def gated_attention(
    q_BNTH: torch.Tensor,
    k_BKTH: torch.Tensor,
    v_BKTH: torch.Tensor,
    gates_G: torch.Tensor,
    *,
    scale: float,
    windows: Sequence[int],
) -> torch.Tensor:
    """Attend among new tokens, each to itself and those before it.

    Args:
        q_BNTH: Queries; N is a multiple of K.
        k_BKTH: Keys.
        v_BKTH: Values.
        gates_G: Logits over the windows, float32.
        scale: Factor on the scores.
        windows: In keys, the query's own included; 0 for all.

    Returns:
        [B, N, T, H].
    """
    return _attend(q_BNTH, k_BKTH, v_BKTH, gates_G, scale, windows)


@gated_attention.register_fake
def _(
    q_BNTH: torch.Tensor,
    k_BKTH: torch.Tensor,
    v_BKTH: torch.Tensor,
    gates_G: torch.Tensor,
    *,
    scale: float,
    windows: Sequence[int],
) -> torch.Tensor:
    return q_BNTH.new_empty((*q_BNTH.shape[:3], v_BKTH.shape[3]))


def _attend(
    q_BNTH: torch.Tensor,
    k_BKTH: torch.Tensor,
    v_BKTH: torch.Tensor,
    gates_G: torch.Tensor,
    scale: float,
    windows: Sequence[int],
) -> torch.Tensor:
    groups, tokens = q_BNTH.shape[1] // k_BKTH.shape[1], q_BNTH.shape[2]
    k_BNTH, v_BNTH = k_BKTH.repeat_interleave(groups, 1), v_BKTH.repeat_interleave(groups, 1)
    places_T = torch.arange(tokens, device=q_BNTH.device)
    distances_TS = places_T[:, None] - places_T
    scores_BNTS = (q_BNTH @ k_BNTH.transpose(2, 3)).float() * scale
    # One product with the values: the mean of attention is attention by the mean of its weights.
    weights_BNTS = torch.zeros_like(scores_BNTS)
    for window, share in zip(windows, gates_G.softmax(-1), strict=True):
        if share == 0:
            continue
        seen_TS = (distances_TS >= 0) & (distances_TS < (window or tokens))
        weights_BNTS = weights_BNTS + share * scores_BNTS.masked_fill(~seen_TS, float("-inf")).softmax(-1)
    return weights_BNTS.type_as(v_BNTH) @ v_BNTH


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs["scale"], keyword_only_inputs["windows"]


def _backward(ctx: Any, gradient_BNTH: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the body, which is computed again: scores are not kept."""
    inputs = [tensor.detach().requires_grad_(True) for tensor in ctx.saved_tensors]
    with torch.enable_grad():
        attended_BNTH = _attend(*inputs, *ctx.options)
    return torch.autograd.grad(attended_BNTH, inputs, gradient_BNTH)


gated_attention.register_autograd(_backward, setup_context=_save)

GATED_ATTENTION = torch.ops.transom.gated_attention.default
