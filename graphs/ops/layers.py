"""Norms, rotary embeddings and gates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from transom.graphs.ops.operation import operation


@operation
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x) * weight` over the last axis, computed in float32 (a `1 + w` norm has its 1 folded in)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@rms_norm.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@operation
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`total = x + residual`; returns `rms_norm(total)` and `total`."""
    total = x + residual
    return rms_norm(total, weight, eps), total


@add_rms_norm.register_fake
def _(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@operation
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
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
"""Activations of gated MLPs, by name."""


@operation
def gated(packed: torch.Tensor, activation: str) -> torch.Tensor:
    """`activation(gate) * up` of a packed projection [..., 2 F] whose first half is the gate; see `ACTIVATIONS`."""
    gate, up = packed.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


@gated.register_fake
def _(packed: torch.Tensor, *_: Any) -> torch.Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


RMS_NORM = torch.ops.transom.rms_norm.default
ADD_RMS_NORM = torch.ops.transom.add_rms_norm.default
ROTARY = torch.ops.transom.rotary.default
GATED = torch.ops.transom.gated.default
