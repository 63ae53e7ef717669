"""Gemma 3's text decoder, as textbook tensor code.

Source: the Gemma 3 report (arXiv 2503.19786) and the released reference implementation. The model knows nothing of
windows being cheap, of quantisation or of runtimes: every cache it is given may be as long as the context, and the
compiler takes the growth of local layers away.

Axes:
    B  batch            T  new tokens        S  cache slots      P  positions whose logits are wanted
    N  query heads      K  kv heads          H  head dim         G  query heads per kv head (N / K)
    D  model width      F  MLP width         V  vocabulary
"""

from __future__ import annotations

import torch
from torch import nn

from transom.zoo.config import DecoderConfig, Rope

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [B, K, S, H]."""


class RMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)`, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


def rotation(positions_T: torch.Tensor, rope: Rope, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's angles, float32 [T, H / 2] each."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents) / rope.factor
    angles = positions_T[:, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + H/2]) of every head, computed in float32."""
    low, high = x_BNTH.chunk(2, dim=-1)
    return torch.cat((low * cos_TH - high * sin_TH, high * cos_TH + low * sin_TH), dim=-1).type_as(x_BNTH)


def write_cache(cache_BKSH: torch.Tensor, new_BKTH: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Put position p into slot p % S."""
    return cache_BKSH.index_copy(2, positions_T % cache_BKSH.shape[2], new_BKTH)


def visible_keys(positions_T: torch.Tensor, slots: int, window: int | None) -> torch.Tensor:
    """Which slots each new token may see, bool [T, S].

    Slot j holds the latest position that was written to it, `last - (last - j) % S`; negative means empty.
    """
    last = positions_T[-1]
    keys_S = last - (last - torch.arange(slots, device=positions_T.device)) % slots
    distance_TS = positions_T[:, None] - keys_S
    seen_TS = (keys_S >= 0) & (distance_TS >= 0)
    return seen_TS if window is None else seen_TS & (distance_TS < window)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm; local or global by its window."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.window = config, config.layer_window(index)
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, K * H, bias=False)
        self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)
        self.q_norm = RMSNorm(H, config.norm_eps)
        self.k_norm = RMSNorm(H, config.norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q_BNTH = rotate(self.q_norm(self.q_proj(x_BTD).view(B, T, N, H)).transpose(1, 2), *cos_sin)
        k_BKTH = rotate(self.k_norm(self.k_proj(x_BTD).view(B, T, K, H)).transpose(1, 2), *cos_sin)
        v_BKTH = self.v_proj(x_BTD).view(B, T, K, H).transpose(1, 2)
        if cache is None:
            k_BKSH, v_BKSH = k_BKTH, v_BKTH
        else:
            k_BKSH, v_BKSH = (
                write_cache(old, new, positions_T) for old, new in zip(cache, (k_BKTH, v_BKTH), strict=True)
            )
        k_BNSH, v_BNSH = (x.repeat_interleave(N // K, dim=1) for x in (k_BKSH, v_BKSH))
        scores_BNTS = (q_BNTH @ k_BNSH.transpose(2, 3)) * self.config.attention_scale
        seen_TS = visible_keys(positions_T, k_BKSH.shape[2], self.window)
        weights_BNTS = scores_BNTS.float().masked_fill(~seen_TS, float("-inf")).softmax(-1).type_as(v_BNSH)
        out_BTNH = (weights_BNTS @ v_BNSH).transpose(1, 2)
        return self.o_proj(out_BTNH.reshape(B, T, N * H)), (k_BKSH, v_BKSH)


class MLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTF = nn.functional.gelu(self.gate_proj(x_BTD), approximate="tanh")
        out_BTD: torch.Tensor = self.down_proj(gate_BTF * self.up_proj(x_BTD))
        return out_BTD


class Layer(nn.Module):
    """One block; norms stand before and after both attention and MLP."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_sin, cache)
        x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD))), cache


class Gemma3(nn.Module):
    """The decoder. Parameter names are those of the released text checkpoints, less the leading `model.`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        """Run the new tokens.

        Args:
            tokens_BT: int64 token ids.
            start: int64 scalar, the position of the first new token.
            caches: One pair a layer, or None to attend among the new tokens only (then `start` is 0).

        Returns:
            Logits [B, T, V] and the caches with the new tokens written into them.
        """
        positions_T = start + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rotations = {
            "local": rotation(positions_T, self.config.rope_local, self.config.head_dim),
            "global": rotation(positions_T, self.config.rope_global, self.config.head_dim),
        }
        # The factor is rounded to the dtype of the weights, as the released implementations do.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.embed_tokens.weight.dtype).item()
        x_BTD = self.embed_tokens(tokens_BT) * scale
        written: list[LayerCache] = []
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_kinds, strict=True)):
            x_BTD, cache = layer(x_BTD, positions_T, rotations[kind], None if caches is None else caches[index])
            written.append(cache)
        logits_BTV = nn.functional.linear(self.norm(x_BTD), self.embed_tokens.weight)
        if (cap := self.config.logit_softcap) is not None:
            logits_BTV = torch.tanh(logits_BTV / cap) * cap
        return logits_BTV, written
