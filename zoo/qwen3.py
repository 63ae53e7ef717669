"""Qwen 3 (dense), as textbook tensor code, and all that is known of its files.

Source: the Qwen 3 report (arXiv 2505.09388) and transformers' `qwen3`. Every head's queries and keys are normed before
they are rotated; nothing has biases. Layers may have a window, as in `qwen2`, which no released size uses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from transom.zoo import pre_norm
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.chat import CHATML
from transom.zoo.checkpoints.gguf_config import USUAL_NEUTRAL
from transom.zoo.config import tile
from transom.zoo.config_keys import Keys
from transom.zoo.layers import RMSNorm, Rotation
from transom.zoo.qwen2 import WINDOW_KEYS, read_layers, write_layers
from transom.zoo.rope import Rope, rotate
from transom.zoo.rope_keys import rope_buffer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(pre_norm.PreNormConfig):
    """A decoder some of whose layers may be local."""

    architecture: str = "qwen3"


class Qwen3Attention(pre_norm.RotatedAttention):
    """Attention with a norm of every head's queries and keys."""

    def __init__(self, config: Qwen3Config, index: int) -> None:
        super().__init__(config, index)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def place(
        self, q_BTX: torch.Tensor, k_BTX: torch.Tensor, cos_sin: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cos_sin is not None
        q_BNTH, k_BKTH = self.q_norm(self.split(q_BTX)), self.k_norm(self.split(k_BTX))
        return rotate(q_BNTH, *cos_sin), rotate(k_BKTH, *cos_sin)


class Qwen3(pre_norm.PreNormDecoder):
    """The decoder."""

    attention = Qwen3Attention


# Class defaults of Qwen3Config, transformers 5.23.
_SIZES = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
}


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    return {**pre_norm.read(text, _SIZES), **read_layers(text, pre_norm.read_depth(text, _SIZES))}


def _write(config: Qwen3Config) -> dict[str, Any]:
    return {**pre_norm.write(config, "qwen3", "Qwen3ForCausalLM"), **write_layers(config)}


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"qwen3": None},
    classes=("Qwen3ForCausalLM",),
    sizes=_SIZES,
    supported=pre_norm.SUPPORTED,
    keys=pre_norm.KEYS | WINDOW_KEYS,
    read=_read,
    write=_write,
    buffer=rope_buffer,
)

_GGUF = GGUFFormat(
    name="qwen3",
    neutral=USUAL_NEUTRAL,
    read=pre_norm.read_gguf,
    tensors={**pre_norm.GGUF_TENSORS, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    rows=pre_norm.as_stored,
)


def _released(size: str, num_layers: int, width: int, mlp: int, heads: int, *, tied: bool = False) -> Preset:
    config = Qwen3Config(
        name=f"qwen3-{size.lower()}", layer_kinds=tile("G", num_layers), hidden_size=width, intermediate_size=mlp,
        num_heads=heads, num_kv_heads=8, head_dim=128, vocab_size=151_936, rope=Rope(theta=1e6), tied=tied,
        context=40_960,
    )  # fmt: skip
    return Preset(config=config, hub=f"Qwen/Qwen3-{size}")


_PRESETS = (
    # Heads that are wider together than the model.
    Preset(
        config=Qwen3Config(
            name="qwen3-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("LLG", 3), window=16, rope=Rope(theta=1e4), tied=False, context=512,
        )
    ),
    _released("0.6B", 28, 1024, 3072, 16, tied=True),
    _released("1.7B", 28, 2048, 6144, 16, tied=True),
    _released("4B", 36, 2560, 9728, 32, tied=True),
    _released("8B", 36, 4096, 12_288, 32),
    _released("14B", 40, 5120, 17_408, 40),
    _released("32B", 64, 5120, 25_600, 64),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="qwen3",
    config=Qwen3Config,
    build=Qwen3,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    chat=CHATML,
)
