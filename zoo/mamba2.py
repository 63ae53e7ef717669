"""Mamba-2's text decoder, as textbook tensor code. Configuration and files: `mamba2_config`, `mamba2_gguf`.

Source: arXiv 2405.21060 and the released reference implementation. A layer keeps no positions but a summary of them:
the last inputs of a short convolution, and the state of a selective state space. Section 9.2.3 puts attention in the
place of a few layers; so it may be here, without positions of its own, as the other layers know the order of tokens.

Axes:
    B  batch            T  new tokens        D  model width      L  inputs that the convolution keeps
    N  heads            G  groups of heads   H  head dim         Z  numbers that a head keeps for each of its H
    K  kv heads (of attention)               I  width of all heads
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from transom.graphs import ops
from transom.zoo.architecture import Architecture, Preset
from transom.zoo.layers import LayerCache, RMSNorm, StackedDecoder, attend
from transom.zoo.mamba2_config import CONTEXT, HUGGINGFACE, Mamba2Config
from transom.zoo.mamba2_gguf import GGUF


class Convolution(nn.Conv1d):
    """Each channel convolved with its own taps over the last inputs."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__(channels, channels, taps, groups=channels)

    def forward(  # type: ignore[override]
        self, x_BTC: torch.Tensor, start: torch.Tensor, before_BLC: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_BTC, after_BLC = ops.CAUSAL_CONVOLUTION(x_BTC, before_BLC, start, self.weight, self.bias)
        return out_BTC, after_BLC


class Norm(RMSNorm):
    """A norm of what may be wider than the model, whose result is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).type_as(self.weight)


class GatedNorm(RMSNorm):
    """`rms_norm(x * silu(gate))`, the heads of every group by themselves."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, x_BTI: torch.Tensor, gate_BTI: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        gated_BTI = x_BTI.float() * nn.functional.silu(gate_BTI.float())
        if self.groups == 1:
            return super().forward(gated_BTI).type_as(x_BTI)
        B, T, I = gated_BTI.shape  # noqa: E741
        grouped = gated_BTI.view(B, T, self.groups, I // self.groups)
        normed = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed.view(B, T, I) * self.weight.float()).type_as(x_BTI)


class Mixer(nn.Module):
    """A convolution and a selective state space, gated."""

    neutral: ClassVar[dict[str, float]] = {"dt_bias": -3.0, "D": 1.0}
    """Around what weights are drawn: steps of 0.05, so that a state reaches back over some tens of tokens."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        D, N, I = config.hidden_size, config.num_heads, config.intermediate_size  # noqa: E741
        self.in_proj = nn.Linear(D, I + config.channels + N, bias=False)
        self.conv1d = Convolution(config.channels, config.taps)
        self.dt_bias = nn.Parameter(torch.zeros(N))
        self.A_log = nn.Parameter(torch.zeros(N))
        self.D = nn.Parameter(torch.ones(N))
        self.norm = GatedNorm(I, config.num_kv_heads, config.norm_eps)
        self.out_proj = nn.Linear(I, D, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, start: torch.Tensor, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        (B, T, _), config = x_BTD.shape, self.config
        N, G, H, Z = config.num_heads, config.num_kv_heads, config.head_dim, config.state_size
        before, state = (None, None) if cache is None else cache
        gate, mixed, steps_BTN = self.in_proj(x_BTD).split_with_sizes([N * H, config.channels, N], -1)
        mixed, before = self.conv1d(mixed, start, before)
        x, keys, queries = nn.functional.silu(mixed).split_with_sizes([N * H, G * Z, G * Z], -1)
        steps_BTN = nn.functional.softplus(steps_BTN.float() + self.dt_bias.float())
        y_BTNH, state = ops.STATE_SPACE(
            x.view(B, T, N, H), steps_BTN, self.A_log, keys.view(B, T, G, Z), queries.view(B, T, G, Z), self.D, state,
            start,
        )  # fmt: skip
        return self.out_proj(self.norm(y_BTNH.view(B, T, N * H), gate)), (before, state)


class Attention(nn.Module):
    """Grouped-query attention, without positions."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        D, N, K, H = config.hidden_size, config.attention_heads, config.attention_kv_heads, config.attention_width
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, start: torch.Tensor, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.attention_heads, self.config.attention_kv_heads, self.config.attention_width
        q_BNTH = self.q_proj(x_BTD).view(B, T, N, H).transpose(1, 2)
        k_BKTH = self.k_proj(x_BTD).view(B, T, K, H).transpose(1, 2)
        v_BKTH = self.v_proj(x_BTD).view(B, T, K, H).transpose(1, 2)
        attended_BTD, cache = attend(q_BNTH, k_BKTH, v_BKTH, cache, positions_T, scale=H**-0.5, window=None)
        return self.o_proj(attended_BTD), cache


class Layer(nn.Module):
    """One block: a norm and a mixer, and no MLP. What layers add to is float32, whatever is computed in."""

    def __init__(self, config: Mamba2Config, index: int) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, config.norm_eps)
        self.mixer = Attention(config) if index in config.attention_layers else Mixer(config)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, start: torch.Tensor, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        mixed_BTD, cache = self.mixer(self.norm(x_BTD), positions_T, start, cache)
        return x_BTD.float() + mixed_BTD.float(), cache


class Mamba2(StackedDecoder):
    """The decoder."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config, Layer, Norm(config.hidden_size, config.norm_eps), tied=config.tied)

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        positions_T = start + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embed_tokens(tokens_BT)
        written: list[LayerCache] = []
        for index, layer in enumerate(self.layers):
            x_BTD, cache = layer(x_BTD, positions_T, start, None if caches is None else caches[index])
            written.append(cache)
        return self.norm(x_BTD), written


def _released(name: str, width: int, depth: int) -> Preset:
    config = Mamba2Config(
        name=f"mamba2-{name}", vocab_size=50_288, hidden_size=width, intermediate_size=2 * width,
        num_heads=width // 32, num_kv_heads=1, head_dim=64, depth=depth, state_size=128, norm_eps=1e-5, tied=True,
        context=CONTEXT,
    )  # fmt: skip
    return Preset(config=config, hub=f"AntonV/mamba2-{name}-hf")


_TINY = Mamba2Config(
    name="mamba2-tiny", vocab_size=512, hidden_size=64, intermediate_size=128, num_heads=8, num_kv_heads=2, head_dim=16,
    depth=3, state_size=16, norm_eps=1e-5, tied=False, context=512,
)  # fmt: skip
_PRESETS = (
    Preset(config=_TINY),
    Preset(
        config=dataclasses.replace(
            _TINY, name="mamba2-hybrid-tiny", num_kv_heads=1, depth=4, attention_layers=(2,), attention_heads=4,
            attention_kv_heads=2, attention_width=16,
        )
    ),
    _released("130m", 768, 24),
    _released("370m", 1024, 48),
    _released("780m", 1536, 48),
    _released("1.3b", 2048, 48),
    _released("2.7b", 2560, 64),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="mamba2",
    config=Mamba2Config,
    build=Mamba2,
    huggingface=HUGGINGFACE,
    gguf=GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 1.0},
)
