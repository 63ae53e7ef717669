"""Pieces that model files share: norms, attention, gated MLPs, what a decoder is, and what a cache is.

Axes:
    B  batch            T  new tokens        S  cache slots      D  model width      F  MLP width
    N  query heads      K  kv heads          H  head dim
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from transom.zoo.config import DecoderConfig

Activation = Callable[[torch.Tensor], torch.Tensor]

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [B, K, S, H]."""

Pattern = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of positions of queries [T, 1] and of keys [S], which keys each query sees, bool [T, S]."""

Rotation = tuple[torch.Tensor, ...]
"""Cosines and sines of the new tokens' angles, each [T, H / 2]; those of keys follow where they are others."""


class Decoder(nn.Module):
    """What every text decoder is to its callers: states, and logits of them.

    Parameter names are those of released text checkpoints, less the leading `model.`.
    """

    head_weight = "embed_tokens.weight"
    """Parameter that states are multiplied with; the table of tokens, where the two are tied."""

    softcap: float | None = None
    """`cap * tanh(logits / cap)` on the logits, or None."""

    logit_scale: float = 1.0
    """Factor on the logits, before their cap."""

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """Run the new tokens as far as the last norm.

        Args:
            tokens_BT: int64 token ids.
            start: int64 scalar, the position of the first new token.
            caches: One pair a layer, or None to attend among the new tokens only (then `start` is 0).
            inputs: What the configuration's `inputs` name.

        Returns:
            States [B, T, D], and the caches with the new tokens written into them.
        """
        raise NotImplementedError

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of states [..., D] that `hidden` returned."""
        logits = nn.functional.linear(x, self.get_parameter(self.head_weight))
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def forward(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """Run the new tokens: logits [B, T, V] and the caches; arguments as `hidden` takes them."""
        x_BTD, written = self.hidden(tokens_BT, start, caches, **inputs)
        return self.head(x_BTD), written


class StackedDecoder(Decoder):
    """A table of tokens, layers that differ at most in window and rotation, a norm, and a head."""

    def __init__(self, config: DecoderConfig, layer: Callable[..., nn.Module], norm: nn.Module, *, tied: bool) -> None:
        """Build it.

        Args:
            config: Goes to every layer.
            layer: Builds a layer of the configuration and its index; it is called with states, positions, its rotation
                or None, and its cache or None, and returns states and the cache.
            norm: Of the last states.
            tied: Whether the head is the table of tokens.
        """
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_layers))
        self.norm = norm
        if not tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.head_weight = "lm_head.weight"

    def rotations(self, positions_T: torch.Tensor) -> Sequence[Rotation | None]:
        """By what each layer rotates queries and keys; None for a layer without positions."""
        raise NotImplementedError

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """What the first layer gets of tokens, [B, T, D]."""
        x_BTD: torch.Tensor = self.embed_tokens(tokens_BT)
        return x_BTD

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        positions_T = start + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embed(tokens_BT)
        written: list[LayerCache] = []
        for index, (layer, cos_sin) in enumerate(zip(self.layers, self.rotations(positions_T), strict=True)):
            x_BTD, cache = layer(x_BTD, positions_T, cos_sin, None if caches is None else caches[index])
            written.append(cache)
        return self.norm(x_BTD), written


class RMSNorm(nn.Module):
    """`x / rms(x) * (offset + weight)`, computed in float32.

    Source: arXiv 1910.07467. Weights that are stored around zero have an offset of 1. Without a width there are none.

    Attributes:
        neutral: Around what random weights are drawn, by parameter; see `checkpoints.random`.
    """

    def __init__(self, width: int | None, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset, self.neutral = eps, offset, {"weight": 1.0 - offset}
        self.weighted = width is not None
        if width is not None:
            self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        if not self.weighted:
            return normed.type_as(x)
        scale = self.offset + self.weight.float() if self.offset else self.weight.float()
        return (normed * scale).type_as(x)


class LayerNorm(nn.Module):
    """`(x - mean(x)) / deviation(x) * weight + bias`, computed in float32 (arXiv 1607.06450).

    Attributes:
        neutral: As of `RMSNorm`.
    """

    def __init__(self, width: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.eps, self.neutral = eps, {"weight": 1.0}
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        return nn.functional.layer_norm(x.float(), weight.shape, weight, bias, self.eps).type_as(x)


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, without biases (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        D, F = hidden_size, intermediate_size
        self.activation = activation
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out_BTD: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out_BTD


class Attention(nn.Module):
    """Grouped-query attention; local or global by its layer's window.

    A family says in `place` what happens to queries and keys between the projections and the scores, and in `pattern`
    which keys a query sees, if that is more than a window.

    Attributes:
        window: Keys that each token sees, itself included; None for all, or where the pattern says it.
        scale: Factor on the scores.
        softcap: Bound on the scores, as `attend` takes it.
    """

    softcap: float | None = None
    pattern: Pattern | None = None

    def __init__(self, config: DecoderConfig, index: int, *, bias: bool = False) -> None:
        """Build it; `bias` says whether queries, keys and values have biases."""
        super().__init__()
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim, self.window, self.scale = H, config.layers[index].window, H**-0.5
        self.q_proj = nn.Linear(D, N * H, bias=bias)
        self.k_proj = nn.Linear(D, K * H, bias=bias)
        self.v_proj = nn.Linear(D, K * H, bias=bias)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, N, T, H] and keys [B, K, T, H] of what the projections say, normed and rotated."""
        raise NotImplementedError

    def split(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """Heads before tokens, [B, N, T, H]."""
        return x_BTX.view(*x_BTX.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, cos_sin: Rotation | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        q_BNTH, k_BKTH = self.place(self.q_proj(x_BTD), self.k_proj(x_BTD), cos_sin)
        v_BKTH = self.split(self.v_proj(x_BTD))
        attended_BTX, cache = attend(
            q_BNTH,
            k_BKTH,
            v_BKTH,
            cache,
            positions_T,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            pattern=self.pattern,
        )
        return self.o_proj(attended_BTX), cache


class PreNormLayer(nn.Module):
    """One block; norms stand before attention and MLP, whose activation is SiLU (Llama, arXiv 2302.13971)."""

    def __init__(self, config: DecoderConfig, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, nn.functional.silu)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, cos_sin: Rotation | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_sin, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class PostNormLayer(nn.Module):
    """One block; norms stand on what attention and MLP give, before it is added (OLMo 2, arXiv 2501.00656)."""

    def __init__(self, config: DecoderConfig, attention: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, activation)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x_BTD: torch.Tensor, positions_T: torch.Tensor, cos_sin: Rotation | None, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        attended_BTD, cache = self.self_attn(x_BTD, positions_T, cos_sin, cache)
        x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(x_BTD)), cache


class SandwichLayer(nn.Module):
    """One block; norms of 1 + w stand before and after both attention and MLP (Gemma 2, arXiv 2408.00118)."""

    def __init__(self, config: DecoderConfig, attention: nn.Module) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.norm_eps
        self.self_attn = attention
        self.mlp = GatedMLP(D, config.intermediate_size, functools.partial(nn.functional.gelu, approximate="tanh"))
        self.input_layernorm = RMSNorm(D, eps, offset=1.0)
        self.post_attention_layernorm = RMSNorm(D, eps, offset=1.0)
        self.pre_feedforward_layernorm = RMSNorm(D, eps, offset=1.0)
        self.post_feedforward_layernorm = RMSNorm(D, eps, offset=1.0)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: Rotation | None,
        cache: LayerCache | None,
        *more: torch.Tensor | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        """Run it; `more` goes to attention."""
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_sin, cache, *more)
        x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD))), cache


def write_cache(cache_BKSH: torch.Tensor, new_BKTH: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Put position p into slot p % S."""
    return cache_BKSH.index_copy(2, positions_T % cache_BKSH.shape[2], new_BKTH)


def visible_keys(
    positions_T: torch.Tensor,
    slots: int,
    window: int | None,
    until_T: torch.Tensor | None = None,
    pattern: Pattern | None = None,
) -> torch.Tensor:
    """Which slots each new token may see, bool [T, S].

    Slot j holds the latest position that was written to it, `last - (last - j) % S`; negative means empty. A token sees
    keys as far as `until_T` says, or as its own position; a window bounds how far back it sees, and a pattern may hide
    more.
    """
    last = positions_T[-1]
    keys_S = last - (last - torch.arange(slots, device=positions_T.device)) % slots
    seen_TS = (keys_S >= 0) & (keys_S <= (positions_T if until_T is None else until_T)[:, None])
    if window is not None:
        seen_TS = seen_TS & (positions_T[:, None] - keys_S < window)
    return seen_TS if pattern is None else seen_TS & pattern(positions_T[:, None], keys_S)


def attend(
    q_BNTH: torch.Tensor,
    k_BKTH: torch.Tensor,
    v_BKTH: torch.Tensor,
    cache: LayerCache | None,
    positions_T: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    until_T: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks_N: torch.Tensor | None = None,
    pattern: Pattern | None = None,
) -> tuple[torch.Tensor, LayerCache]:
    """Grouped-query attention: write the new keys and values, then softmax over the keys that each token sees.

    Args:
        q_BNTH: Queries; N is a multiple of K.
        k_BKTH: New keys.
        v_BKTH: New values.
        cache: Earlier keys and values; None to attend among the new tokens only.
        positions_T: Of the new tokens.
        scale: Factor on the scores.
        window: Keys that each token sees, itself included; None for all.
        until_T: Last position that each token sees, a new one; None for its own.
        softcap: `cap * tanh(scores / cap)` before the mask (Gemma 2, arXiv 2408.00118, section 2); None for none.
        sinks_N: A score of every query head that takes part in the softmax and has no value, so that a token may attend
            to nothing (gpt-oss); None for none.
        pattern: Which of those keys it sees; None for all.

    Returns:
        The values' means [B, T, N * H], and the cache with the new tokens in it.
    """
    if cache is None:
        k_BKSH, v_BKSH = k_BKTH, v_BKTH
    else:
        k_BKSH, v_BKSH = (write_cache(old, new, positions_T) for old, new in zip(cache, (k_BKTH, v_BKTH), strict=True))
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH, v_BNSH = (x.repeat_interleave(groups, dim=1) for x in (k_BKSH, v_BKSH))
    scores_BNTS = ((q_BNTH @ k_BNSH.transpose(2, 3)) * scale).float()
    if softcap is not None:
        scores_BNTS = torch.tanh(scores_BNTS / softcap) * softcap
    seen_TS = visible_keys(positions_T, k_BKSH.shape[2], window, until_T, pattern)
    masked_BNTS = scores_BNTS.masked_fill(~seen_TS, float("-inf"))
    if sinks_N is None:
        weights_BNTS = masked_BNTS.softmax(-1)
    else:
        sinks_BNT1 = sinks_N.float()[None, :, None, None].expand(*masked_BNTS.shape[:3], 1)
        weights_BNTS = torch.cat((masked_BNTS, sinks_BNT1), -1).softmax(-1)[..., :-1]
    out_BTNH = (weights_BNTS.type_as(v_BNSH) @ v_BNSH).transpose(1, 2)
    B, T, N, H = out_BTNH.shape
    return out_BTNH.reshape(B, T, N * H), (k_BKSH, v_BKSH)
