"""Gemma 3 in numpy and float64, to be read beside the paper: no cache, no chunk, every mask written out.

It shares no code with any runtime, so that agreement with it means something.

Axes:
    T  tokens (queries)   J  tokens (keys)      D  model width   F  MLP width   V  vocabulary
    N  query heads        K  kv heads           H  head dim
    P  patches            Q  soft tokens        E  width of the image encoder
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

SOFT = -1
"""Stands among token ids where a soft token of an image does."""

TEXT = -1
"""Block of a token that belongs to no image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer: its window in keys (None: global) and its rotary embedding."""

    window: int | None
    theta: float
    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder: patches of `patch` x `patch` pixels, averaged to `soft_tokens`."""

    num_layers: int
    num_heads: int
    patch: int
    soft_tokens: int
    eps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the numbers depend on; `vision` is None for a model of text."""

    layers: tuple[LayerConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    eps: float
    softcap: float | None
    vision: VisionConfig | None = None


def read_config(path: Path) -> Config:
    """Read a `config.json` with Hugging Face's keys (those of transformers 5)."""
    outer = json.loads(path.read_text())
    data, vision, layers = outer.get("text_config", outer), None, []
    if "vision_config" in outer:
        sizes = outer["vision_config"]
        vision = VisionConfig(
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            patch=sizes["patch_size"],
            soft_tokens=outer["mm_tokens_per_image"],
            eps=sizes["layer_norm_eps"],
        )
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
        vision=vision,
    )


def read_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Read a safetensors file; names of the decoder lose what stands before `embed_tokens`, `layers` and `norm`."""
    return {
        name.removeprefix("language_model.").removeprefix("model."): array for name, array in load_file(path).items()
    }


def blocks_of(tokens_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the image that each token belongs to, or `TEXT`: soft tokens in a row are one image's."""
    is_soft_T = tokens_T == SOFT
    begins_T = is_soft_T & ~np.concatenate(([False], is_soft_T[:-1]))
    return np.where(is_soft_T, np.cumsum(begins_T) - 1, TEXT)


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


def layer_norm(x: Array, weights: Weights, eps: float) -> Array:
    """`(x - mean(x)) / deviation(x) * weight + bias`."""
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(
        centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) * weights["weight"] + weights["bias"]
    )


def encode_image(config: Config, weights: Weights, pixels: NDArray[Any]) -> Array:
    """Soft tokens [Q, D] of an image's pixels [3, S, S] between -1 and 1, rows of pixels from the top."""
    vision, weights = config.vision, {name: array.astype(np.float64) for name, array in weights.items()}
    assert vision is not None, "a model of text encodes no image"
    tower = _below(weights, "vision_tower.vision_model.")

    def linear(x: Array, own: Weights) -> Array:
        return np.asarray(x @ own["weight"].reshape(own["weight"].shape[0], -1).T + own["bias"])

    # Patches in rows, each as its colours, rows and columns.
    side, patch = pixels.shape[1] // vision.patch, vision.patch
    grid = pixels.astype(np.float64).reshape(3, side, patch, side, patch).transpose(1, 3, 0, 2, 4)
    x_PE = linear(grid.reshape(side * side, -1), _below(tower, "embeddings.patch_embedding."))
    x_PE = x_PE + tower["embeddings.position_embedding.weight"]
    for index in range(vision.num_layers):
        own = _below(tower, f"encoder.layers.{index}.")
        normed_PE = layer_norm(x_PE, _below(own, "layer_norm1."), vision.eps)
        q_NPH, k_NPH, v_NPH = (
            linear(normed_PE, _below(own, f"self_attn.{name}_proj."))
            .reshape(side * side, vision.num_heads, -1)
            .transpose(1, 0, 2)
            for name in "qkv"
        )
        weights_NPP = softmax(q_NPH @ k_NPH.transpose(0, 2, 1) * q_NPH.shape[-1] ** -0.5)
        attended_PE = (weights_NPP @ v_NPH).transpose(1, 0, 2).reshape(x_PE.shape)
        x_PE = x_PE + linear(attended_PE, _below(own, "self_attn.out_proj."))
        normed_PE = layer_norm(x_PE, _below(own, "layer_norm2."), vision.eps)
        x_PE = x_PE + linear(gelu_tanh(linear(normed_PE, _below(own, "mlp.fc1."))), _below(own, "mlp.fc2."))
    x_PE = layer_norm(x_PE, _below(tower, "post_layernorm."), vision.eps)
    # A soft token is the average of a square of patches.
    out = round(vision.soft_tokens**0.5)
    pooled_QE = x_PE.reshape(out, side // out, out, side // out, -1).mean((1, 3)).reshape(out * out, -1)
    own = _below(weights, "multi_modal_projector.")
    normed_QE = rms_norm(pooled_QE, own["mm_soft_emb_norm.weight"], vision.eps)
    return np.asarray(normed_QE @ own["mm_input_projection_weight"])


def compute_logits(config: Config, weights: Weights, tokens_T: NDArray[np.int64], soft: Array | None = None) -> Array:
    """Logits of every position, [T, V].

    Args:
        config: The model.
        weights: As `read_weights` names them.
        tokens_T: Token ids; `SOFT` where a soft token stands.
        soft: Soft tokens in their order, [..., D]; None if there are none.
    """
    blocks_T = blocks_of(tokens_T)
    table = weights["embed_tokens.weight"]
    # The released implementations round this factor to the dtype of the weights.
    factor = np.float64(table.dtype.type(table.shape[1] ** 0.5))
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    x_TD = weights["embed_tokens.weight"][tokens_T] * factor
    if soft is not None:
        x_TD[tokens_T == SOFT] = soft.reshape(-1, x_TD.shape[1])
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
