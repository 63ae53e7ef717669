"""A Gemma 3 decoder in numpy and float64, to be read beside the paper: no cache, no chunk, every mask written out.

It shares no code with any runtime, so that agreement with it means something.

Axes:
    T  tokens (queries)   J  tokens (keys)      D  model width   F  MLP width   V  vocabulary
    N  query heads        K  kv heads           H  head dim
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[Any]]

TEXT = -1
"""Block of a token that belongs to no image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer: its window in keys (None: global) and its rotary embedding."""

    window: int | None
    theta: float
    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the numbers depend on."""

    layers: tuple[LayerConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    eps: float
    softcap: float | None


def read_config(path: Path) -> Config:
    """Read a `config.json` with Hugging Face's keys (those of transformers 5)."""
    data = json.loads(path.read_text())
    layers = []
    for kind in data["layer_types"]:
        rope = data["rope_parameters"][kind]
        window = data["sliding_window"] if kind == "sliding_attention" else None
        layers.append(LayerConfig(window=window, theta=rope["rope_theta"], factor=rope.get("factor", 1.0)))
    return Config(
        layers=tuple(layers),
        num_heads=data["num_attention_heads"],
        num_kv_heads=data["num_key_value_heads"],
        head_dim=data["head_dim"],
        scale=data["query_pre_attn_scalar"] ** -0.5,
        eps=data["rms_norm_eps"],
        softcap=data["final_logit_softcapping"],
    )


def read_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Read a safetensors file; names lose the leading `model.`."""
    return {name.removeprefix("model."): array for name, array in load_file(path).items()}


def visible(blocks_T: NDArray[np.int64], window: int | None) -> NDArray[np.bool_]:
    """Which keys each token sees, [T, J].

    A token sees itself and what came before it; the tokens of one image also see each other, whichever comes first.
    In a local layer the window then hides keys that lie `window` or more positions back: also those of the same image.
    """
    positions = np.arange(blocks_T.size)
    distance_TJ = positions[:, None] - positions[None, :]
    same_image_TJ = (blocks_T[:, None] == blocks_T[None, :]) & (blocks_T[:, None] != TEXT)
    seen_TJ = (distance_TJ >= 0) | same_image_TJ
    if window is not None:
        seen_TJ = seen_TJ & (distance_TJ < window)
    return np.asarray(seen_TJ)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`x / rms(x) * (1 + weight)`."""
    return np.asarray(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * (1.0 + weight))


def rotate(x_NTH: Array, theta: float, factor: float) -> Array:
    """Turn the pair (x[i], x[i + H/2]) of the token at position p by `p / factor * theta ** (-2 i / H)`."""
    _, T, H = x_NTH.shape
    angles_TH = np.arange(T)[:, None] / factor * theta ** (-2.0 * np.arange(H // 2) / H)
    cos, sin = np.cos(angles_TH), np.sin(angles_TH)
    low, high = x_NTH[..., : H // 2], x_NTH[..., H // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def gelu_tanh(x: Array) -> Array:
    """GELU by its tanh formula."""
    return np.asarray(0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))))


def attention(x_TD: Array, weights: Weights, config: Config, layer: LayerConfig, blocks_T: NDArray[np.int64]) -> Array:
    """One layer's attention, before its output norm."""
    T = x_TD.shape[0]

    def heads(name: str, count: int) -> Array:
        return np.asarray((x_TD @ weights[f"{name}.weight"].T).reshape(T, count, config.head_dim).transpose(1, 0, 2))

    q_NTH = rms_norm(heads("q_proj", config.num_heads), weights["q_norm.weight"], config.eps)
    k_KJH = rms_norm(heads("k_proj", config.num_kv_heads), weights["k_norm.weight"], config.eps)
    v_KJH = heads("v_proj", config.num_kv_heads)
    q_NTH, k_KJH = (rotate(x, layer.theta, layer.factor) for x in (q_NTH, k_KJH))
    # Query heads in a row share one kv head.
    k_NJH, v_NJH = (np.repeat(x, config.num_heads // config.num_kv_heads, axis=0) for x in (k_KJH, v_KJH))
    scores_NTJ = q_NTH @ k_NJH.transpose(0, 2, 1) * config.scale
    weights_NTJ = softmax(np.where(visible(blocks_T, layer.window), scores_NTJ, -np.inf))
    out_TNH = (weights_NTJ @ v_NJH).transpose(1, 0, 2)
    return np.asarray(out_TNH.reshape(T, -1) @ weights["o_proj.weight"].T)


def mlp(x_TD: Array, weights: Weights) -> Array:
    """The gated MLP."""
    gate_TF, up_TF = (x_TD @ weights[f"{name}_proj.weight"].T for name in ("gate", "up"))
    return np.asarray((gelu_tanh(gate_TF) * up_TF) @ weights["down_proj.weight"].T)


def compute_logits(
    config: Config, weights: Weights, tokens_T: NDArray[np.int64], blocks_T: NDArray[np.int64] | None = None
) -> Array:
    """Logits of every position, [T, V].

    Args:
        config: The model.
        weights: By name, without the leading `model.`.
        tokens_T: Token ids.
        blocks_T: Number of the image that each token belongs to, or `TEXT`; by default all is text.
    """
    blocks_T = np.full(tokens_T.shape, TEXT) if blocks_T is None else blocks_T
    table = weights["embed_tokens.weight"]
    # The released implementations round this factor to the dtype of the weights.
    factor = np.float64(table.dtype.type(table.shape[1] ** 0.5))
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    x_TD = weights["embed_tokens.weight"][tokens_T] * factor
    for index, layer in enumerate(config.layers):
        own = _below(weights, f"layers.{index}.")

        def norm(x: Array, name: str, own: Weights = own) -> Array:
            return rms_norm(x, own[f"{name}_layernorm.weight"], config.eps)

        attended = attention(norm(x_TD, "input"), _below(own, "self_attn."), config, layer, blocks_T)
        x_TD = x_TD + norm(attended, "post_attention")
        x_TD = x_TD + norm(mlp(norm(x_TD, "pre_feedforward"), _below(own, "mlp.")), "post_feedforward")
    logits_TV = rms_norm(x_TD, weights["norm.weight"], config.eps) @ weights["embed_tokens.weight"].T
    return logits_TV if config.softcap is None else config.softcap * np.tanh(logits_TV / config.softcap)


def _below(weights: Weights, prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
