"""Gemma 4's text decoder, as textbook tensor code. Configuration and files: `gemma4_config`, `gemma4_gguf`.

Source: transformers 5.23, `gemma4`. Beside what Gemma 3 has, heads of global layers are wider than those of local ones,
and in larger models their values are the keys before norm and rotation; the last layers of the small models keep no
keys and values, and read those of the last layer of their kind that does; a second table of tokens adds something of
its own to every layer; and one model has a mixture of experts beside every MLP. Weights of norms are plain, not around
zero.

Axes:
    B  batch            T  new tokens        D  model width      L  layers           P  width of a layer's own embedding
    N  query heads      K  kv heads          H  head dim         E  experts          C  chosen ones
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from transom.zoo.architecture import Architecture, Preset
from transom.zoo.config import tile
from transom.zoo.experts import Experts, gated, route
from transom.zoo.gemma4_config import HUGGINGFACE, ROPES, Gemma4Config
from transom.zoo.gemma4_gguf import GGUF
from transom.zoo.layers import Decoder, GatedMLP, LayerCache, RMSNorm, Rotation, attend
from transom.zoo.rope import rotate, rotation

_gelu = functools.partial(nn.functional.gelu, approximate="tanh")


class Attention(nn.Module):
    """Grouped-query attention whose queries, keys and values are normed; over its own keys or an earlier layer's."""

    def __init__(self, config: Gemma4Config, index: int) -> None:
        super().__init__()
        layer, D, N, eps = config.layers[index], config.hidden_size, config.num_heads, config.norm_eps
        K, H = layer.kv_heads, layer.key_width
        self.window, self.head_dim = layer.window, H
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.q_norm = RMSNorm(H, eps)
        # Scores have no factor: trained weights are small.
        self.q_norm.neutral = {"weight": H**-0.5}
        if K:
            self.k_proj = nn.Linear(D, K * H, bias=False)
            self.k_norm, self.v_norm = RMSNorm(H, eps), RMSNorm(None, eps)
            if not (config.keys_as_values and layer.kind == "global"):
                self.v_proj = nn.Linear(D, K * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_sin: Rotation,
        cache: LayerCache | None,
        shared: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(*x.shape[:2], -1, self.head_dim)

        q_BNTH = rotate(self.q_norm(heads(self.q_proj(x_BTD))).transpose(1, 2), *cos_sin)
        if shared is not None:
            # Its new tokens are written already.
            attended_BTD, written = attend(q_BNTH, *shared, None, positions_T, scale=1.0, window=self.window)
            return self.o_proj(attended_BTD), written
        k_BTKH = heads(self.k_proj(x_BTD))
        v_BTKH = heads(self.v_proj(x_BTD)) if hasattr(self, "v_proj") else k_BTKH
        k_BKTH = rotate(self.k_norm(k_BTKH).transpose(1, 2), *cos_sin)
        v_BKTH = self.v_norm(v_BTKH).transpose(1, 2)
        attended_BTD, written = attend(q_BNTH, k_BKTH, v_BKTH, cache, positions_T, scale=1.0, window=self.window)
        return self.o_proj(attended_BTD), written


class Router(nn.Module):
    """Chooses experts by a softmax over all, and gives the chosen ones' shares, which add up to 1, a factor each."""

    neutral: ClassVar[Mapping[str, float]] = {"scale": 1.0, "per_expert_scale": 1.0}

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        D, self.chosen = config.hidden_size, config.chosen
        self.norm = RMSNorm(None, config.norm_eps)
        self.scale = nn.Parameter(torch.ones(D))
        self.proj = nn.Linear(D, config.experts, bias=False)
        self.per_expert_scale = nn.Parameter(torch.ones(config.experts))

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BTE = self.proj(self.norm(x_BTD) * self.scale * x_BTD.shape[-1] ** -0.5)
        choices_BTC, weights_BTC = route(logits_BTE, self.chosen)
        return choices_BTC, weights_BTC * self.per_expert_scale[choices_BTC]


class Layer(nn.Module):
    """One block; norms stand before and after attention and MLP, and after what the layer's own embedding adds."""

    neutral: ClassVar[Mapping[str, float]] = {"layer_scalar": 1.0}

    def __init__(self, config: Gemma4Config, index: int) -> None:
        super().__init__()
        D, P, eps = config.hidden_size, config.layer_embedding, config.norm_eps
        wide = config.wide_shared and index >= config.unshared
        self.self_attn = Attention(config, index)
        self.mlp = GatedMLP(D, config.intermediate_size * (2 if wide else 1), _gelu)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.post_feedforward_layernorm = RMSNorm(D, eps)
        if config.experts:
            self.router = Router(config)
            self.experts = Experts(config.experts, D, config.expert_size, gated(_gelu), biases=False)
            self.post_feedforward_layernorm_1 = RMSNorm(D, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(D, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(D, eps)
        if P:
            self.per_layer_input_gate = nn.Linear(D, P, bias=False)
            self.per_layer_projection = nn.Linear(P, D, bias=False)
            self.post_per_layer_input_norm = RMSNorm(D, eps)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(
        self,
        x_BTD: torch.Tensor,
        own_BTP: torch.Tensor | None,
        positions_T: torch.Tensor,
        cos_sin: Rotation,
        cache: LayerCache | None,
        shared: LayerCache | None,
    ) -> tuple[torch.Tensor, LayerCache]:
        attended_BTD, written = self.self_attn(self.input_layernorm(x_BTD), positions_T, cos_sin, cache, shared)
        x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
        x_BTD = x_BTD + self.post_feedforward_layernorm(self.feed_forward(x_BTD))
        if own_BTP is not None:
            gated_BTP = _gelu(self.per_layer_input_gate(x_BTD)) * own_BTP
            x_BTD = x_BTD + self.post_per_layer_input_norm(self.per_layer_projection(gated_BTP))
        return x_BTD * self.layer_scalar, written

    def feed_forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The MLP, and the experts beside it, if there are any."""
        dense_BTD: torch.Tensor = self.mlp(self.pre_feedforward_layernorm(x_BTD))
        if not hasattr(self, "experts"):
            return dense_BTD
        routed_BTD = self.experts(self.pre_feedforward_layernorm_2(x_BTD), *self.router(x_BTD))
        summed_BTD: torch.Tensor = self.post_feedforward_layernorm_1(dense_BTD) + self.post_feedforward_layernorm_2(
            routed_BTD
        )
        return summed_BTD


class Gemma4(Decoder):
    """The decoder."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config, self.softcap = config, config.logit_softcap
        D, L, P = config.hidden_size, config.num_layers, config.layer_embedding
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(L))
        self.norm = RMSNorm(D, config.norm_eps)
        if P:
            self.embed_tokens_per_layer = nn.Embedding(config.vocab_size, L * P)
            self.per_layer_model_projection = nn.Linear(D, L * P, bias=False)
            self.per_layer_projection_norm = RMSNorm(P, config.norm_eps)

    def layer_embeddings(self, tokens_BT: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        """What every layer is given of its own, side by side: of the tokens, and of their embeddings, [B, T, L * P]."""
        shape = (*tokens_BT.shape, self.config.num_layers, self.config.layer_embedding)
        of_tokens_BTLP = _look_up(self.embed_tokens_per_layer, tokens_BT, self.config.layer_embedding).view(shape)
        projected_BTLP = (self.per_layer_model_projection(x_BTD) * self.config.hidden_size**-0.5).view(shape)
        embedded_BTLP: torch.Tensor = (self.per_layer_projection_norm(projected_BTLP) + of_tokens_BTLP) * 2.0**-0.5
        return embedded_BTLP.flatten(2)

    def hidden(
        self, tokens_BT: torch.Tensor, start: torch.Tensor, caches: list[LayerCache] | None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCache]]:
        config = self.config
        positions_T = start + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rotations = {
            "local": rotation(positions_T, config.rope_local, config.head_dim),
            "global": rotation(positions_T, config.rope_global, config.global_head_dim),
        }
        x_BTD = _look_up(self.embed_tokens, tokens_BT, config.hidden_size)
        own: tuple[torch.Tensor | None, ...] = (None,) * config.num_layers
        if config.layer_embedding:
            own = torch.split(self.layer_embeddings(tokens_BT, x_BTD), config.layer_embedding, dim=-1)
        written: list[LayerCache] = []
        for index, (layer, kind) in enumerate(zip(self.layers, config.layer_kinds, strict=True)):
            owns = index < config.unshared
            x_BTD, after = layer(
                x_BTD,
                own[index],
                positions_T,
                rotations[kind],
                caches[index] if owns and caches is not None else None,
                None if owns else written[config.source(index)],
            )
            if owns:
                written.append(after)
        return self.norm(x_BTD), written


def _look_up(table: nn.Embedding, tokens_BT: torch.Tensor, width: int) -> torch.Tensor:
    # The factor is rounded to the dtype of the weights, as the released implementations do.
    rows: torch.Tensor = table(tokens_BT) * torch.tensor(width**0.5, dtype=table.weight.dtype).item()
    return rows


# Turns of system, user and model, as ai.google.dev describes them.
_CHAT = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{% set role = {'system': 'system', 'user': 'user', 'assistant': 'model', 'model': 'model'}.get(turn.role) %}"
    "{% if not role or (role == 'system' and not loop.first) %}"
    "{{ raise_exception('message ' ~ loop.index ~ ' has role \\'' ~ turn.role ~ '\\': "
    "after an optional system message come user and assistant') }}"
    "{% endif %}"
    "<|turn>{{ role }}\n{{ turn.content.strip() }}<turn|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def _released(name: str, pattern: str, num_layers: int, **sizes: Any) -> Gemma4Config:
    """A released size."""
    return Gemma4Config(
        name=name,
        layer_kinds=tile(pattern, num_layers),
        rope_local=ROPES["sliding_attention"],
        rope_global=ROPES["full_attention"],
        logit_softcap=30.0,
        **{
            "vocab_size": 262_144, "head_dim": 256, "global_head_dim": 512, "window": 1024, "context": 262_144, **sizes,
        },
    )  # fmt: skip


_SMALL: dict[str, Any] = {"num_heads": 8, "window": 512, "context": 131_072, "layer_embedding": 256}
_PRESETS = (
    # Two layers of either kind that share, twice as wide; slots of global layers differ in width.
    Preset(
        config=_released(
            "gemma4-tiny", "LLG", 6, vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=16, global_kv_heads=2, global_head_dim=32, window=16, context=512, layer_embedding=32,
            shared_layers=3, wide_shared=True,
        )
    ),
    # As the larger ones: values are keys, no layer shares; and experts, some of which no token chooses.
    Preset(
        config=_released(
            "gemma4-experts-tiny", "LLG", 3, vocab_size=512, hidden_size=64, intermediate_size=48, num_heads=4,
            num_kv_heads=4, head_dim=16, global_kv_heads=2, global_head_dim=32, keys_as_values=True, window=16,
            context=512, experts=8, chosen=3, expert_size=32,
        )
    ),
    Preset(
        config=_released("gemma4-e2b", "LLLLG", 35, hidden_size=1536, intermediate_size=6144, num_kv_heads=1,
                         global_kv_heads=1, shared_layers=20, wide_shared=True, **_SMALL),
        hub="google/gemma-4-E2B-it",
    ),
    Preset(
        config=_released("gemma4-e4b", "LLLLLG", 42, hidden_size=2560, intermediate_size=10_240, num_kv_heads=2,
                         global_kv_heads=2, shared_layers=18, **_SMALL),
        hub="google/gemma-4-E4B-it",
    ),
    Preset(
        config=_released("gemma4-12b", "LLLLLG", 48, hidden_size=3840, intermediate_size=15_360, num_heads=16,
                         num_kv_heads=8, global_kv_heads=1, keys_as_values=True),
        hub="google/gemma-4-12B-it",
    ),
    Preset(
        config=_released("gemma4-26b-a4b", "LLLLLG", 30, hidden_size=2816, intermediate_size=2112, num_heads=16,
                         num_kv_heads=8, global_kv_heads=2, keys_as_values=True, experts=128, chosen=8,
                         expert_size=704),
        hub="google/gemma-4-26B-A4B-it",
    ),
    Preset(
        config=_released("gemma4-31b", "LLLLLG", 60, hidden_size=5376, intermediate_size=21_504, num_heads=32,
                         num_kv_heads=16, global_kv_heads=4, keys_as_values=True),
        hub="google/gemma-4-31B-it",
    ),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="gemma4",
    config=Gemma4Config,
    build=Gemma4,
    huggingface=HUGGINGFACE,
    gguf=GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
    chat=_CHAT,
)
