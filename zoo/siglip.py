"""SigLIP's image encoder, as textbook tensor code, and what is known of its files.

Source: SigLIP (arXiv 2303.15343), and Gemma 3's report (arXiv 2503.19786, section 2.1) for the size that it is used in:
So400m, patches of 14 on images of 896, without the pooling head. Every patch sees every other one.

Axes:
    B  images          C  colours           P  patches of an image      E  encoder width
    N  heads           H  head dim
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from transom.errors import ConfigError
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.config_keys import Keys, is_positive

COLOURS = 3
_HALF = 0.5
"""Mean and deviation of every colour, which bring pixels between -1 and 1."""

_LARGEST = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_layers": 2**10,
    "num_heads": 2**10,
    "image_size": 2**14,
    "patch_size": 2**10,
}
"""No encoder comes near these sizes: a larger one is a damaged config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Sizes of an image encoder.

    Attributes:
        hidden_size: Its width.
        intermediate_size: Width of the MLP.
        num_layers: Number of layers.
        num_heads: Heads; divides `hidden_size`.
        image_size: Pixels along a side of an image.
        patch_size: Pixels along a side of a patch; divides `image_size`.
        norm_eps: Epsilon of every norm.

    Raises:
        ConfigError: If a size is no whole number within bounds, or does not divide as it must.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    image_size: int = 896
    patch_size: int = 14
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            size: Any = getattr(self, name)
            if type(size) is not int or not 1 <= size <= largest:
                raise ConfigError(f"vision: {name} is {size!r}, expected a whole number from 1 to {largest:,}")
        if not is_positive(self.norm_eps):
            raise ConfigError(f"vision: norm_eps is {self.norm_eps!r}, expected a positive finite number")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"vision: {self.num_heads} heads do not divide a width of {self.hidden_size}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision: patches of {self.patch_size} pixels do not divide an image of {self.image_size}"
            )

    @property
    def side(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size


class Embeddings(nn.Module):
    """A vector for every patch: a product of its pixels, and one of its place."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(COLOURS, config.hidden_size, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden_size)

    def forward(self, pixels_BCYX: torch.Tensor) -> torch.Tensor:
        B, side, patch = pixels_BCYX.shape[0], self.config.side, self.config.patch_size
        # The kernel is as wide as its stride, so the convolution is a product for each patch.
        grid = pixels_BCYX.reshape(B, COLOURS, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        patches_BPF = grid.reshape(B, side * side, COLOURS * patch * patch)
        convolution = self.patch_embedding
        vectors_BPE = nn.functional.linear(patches_BPF, convolution.weight.flatten(1), convolution.bias)
        return vectors_BPE + self.position_embedding.weight


class Attention(nn.Module):
    """Attention of all patches to all patches."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        E = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj = nn.Linear(E, E), nn.Linear(E, E)
        self.v_proj, self.out_proj = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x_BPE: torch.Tensor) -> torch.Tensor:
        B, P, E = x_BPE.shape
        N, H = self.num_heads, E // self.num_heads
        q_BNPH, k_BNPH, v_BNPH = (
            project(x_BPE).view(B, P, N, H).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores_BNPP = (q_BNPH @ k_BNPH.transpose(2, 3)) * H**-0.5
        attended_BNPH = scores_BNPP.float().softmax(-1).type_as(v_BNPH) @ v_BNPH
        out_BPE: torch.Tensor = self.out_proj(attended_BNPH.transpose(1, 2).reshape(B, P, E))
        return out_BPE


class MLP(nn.Module):
    """`fc2(gelu(fc1(x)))`."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BPE: torch.Tensor) -> torch.Tensor:
        out_BPE: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(x_BPE), approximate="tanh"))
        return out_BPE


class Layer(nn.Module):
    """One block, with norms before attention and MLP."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BPE: torch.Tensor) -> torch.Tensor:
        x_BPE = x_BPE + self.self_attn(self.layer_norm1(x_BPE))
        out_BPE: torch.Tensor = x_BPE + self.mlp(self.layer_norm2(x_BPE))
        return out_BPE


class Encoder(nn.Module):
    """The layers, first to last."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(self, x_BPE: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_BPE = layer(x_BPE)
        return x_BPE


class Siglip(nn.Module):
    """The image encoder: pixels [B, 3, S, S] between -1 and 1 to vectors [B, P, E], row after row of patches.

    Parameter names are those of released checkpoints, less their prefix.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, pixels_BCYX: torch.Tensor) -> torch.Tensor:
        out_BPE: torch.Tensor = self.post_layernorm(self.encoder(self.embeddings(pixels_BCYX)))
        return out_BPE


_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
_ACTIVATION = "gelu_pytorch_tanh"
_SUPPORTED = {
    "model_type": ("siglip_vision_model",),
    "hidden_act": (_ACTIVATION,),
    "num_channels": (COLOURS,),
    "vision_use_head": (False,),
}


def read_siglip(keys: Keys) -> SiglipConfig:
    """Read a `vision_config`.

    A size that it leaves out is So400m's: transformers would take those of SigLIP's base size, which no checkpoint of
    this family has, and the shapes of its tensors tell the two apart.

    Raises:
        ConfigError: If a value is of the wrong kind, or asks for what the encoder does not compute.
    """
    for key, allowed in _SUPPORTED.items():
        if key in keys.values and keys.values[key] not in allowed:
            keys.refuse(key, f"only {allowed[0]!r} is supported")
    sizes = {field: keys.whole(key, getattr(SiglipConfig, field), _LARGEST[field]) for field, key in _FIELDS.items()}
    return SiglipConfig(**sizes, norm_eps=keys.number("layer_norm_eps", SiglipConfig.norm_eps))


_GGUF_FIELDS = {
    "hidden_size": "vision.embedding_length",
    "intermediate_size": "vision.feed_forward_length",
    "num_layers": "vision.block_count",
    "num_heads": "vision.attention.head_count",
    "image_size": "vision.image_size",
    "patch_size": "vision.patch_size",
}
_GGUF_BLOCK = re.compile(r"v\.blk\.(\d+)\.")
_GGUF_NAMES = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "post_layernorm": "v.post_ln",
}
_GGUF_NAMES_IN_BLOCKS = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def read_siglip_gguf(header: Header, keys: Metadata) -> SiglipConfig:
    """Read the keys of an mmproj file, by the rules of llama.cpp.

    Raises:
        ConfigError: If a key is missing, of the wrong kind, contradicts the tensors, or asks for what the encoder does
            not compute.
    """
    # Where both are missing, llama.cpp takes a third activation.
    keys.only("use_gelu", (True,), required=True)
    keys.only("use_silu", (False,))
    for key in ("vision.image_mean", "vision.image_std"):
        keys.unread.discard(key)
        if not np.array_equal(np.asarray(keys.values.get(key), object), [_HALF] * COLOURS):
            raise keys.refuse(key, f"only {_HALF} for each of {COLOURS} colours is supported: choose another model")
    sizes = {field: keys.size(key) for field, key in _GGUF_FIELDS.items()}
    blocks = {match[1] for name in header.tensors if (match := _GGUF_BLOCK.match(name))}
    if len(blocks) != sizes["num_layers"]:
        raise keys.refuse("vision.block_count", f"but the file holds {len(blocks)} layers: convert the model again")
    try:
        return SiglipConfig(**sizes, norm_eps=keys.number("vision.attention.layer_norm_epsilon"))
    except ConfigError as error:
        raise ConfigError(f"{keys.path}: {error}: convert the model again") from None


def siglip_gguf_names(config: SiglipConfig, header: Header) -> dict[str, str]:
    """What an mmproj file calls the encoder's tensors, by their names in the module."""
    in_blocks = dict(_GGUF_NAMES_IN_BLOCKS)
    down = header.tensors.get("v.blk.0.ffn_down.weight")
    if down is not None and down.shape == (config.intermediate_size, config.hidden_size) != down.shape[::-1]:
        # llama.cpp's first converter called fc1 ffn_down and fc2 ffn_up, and its files are still about.
        in_blocks |= {"mlp.fc1": in_blocks["mlp.fc2"], "mlp.fc2": in_blocks["mlp.fc1"]}
    names = dict(_GGUF_NAMES)
    for index in range(config.num_layers):
        names |= {f"encoder.layers.{index}.{ours}": f"v.blk.{index}.{theirs}" for ours, theirs in in_blocks.items()}
    return {f"{ours}.{last}": f"{theirs}.{last}" for ours, theirs in names.items() for last in ("weight", "bias")}


def write_siglip(config: SiglipConfig) -> dict[str, Any]:
    """A `vision_config` that `read_siglip` and transformers read alike."""
    return {
        "model_type": "siglip_vision_model",
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        "layer_norm_eps": config.norm_eps,
        "hidden_act": _ACTIVATION,
        "num_channels": COLOURS,
        "vision_use_head": False,
    }
