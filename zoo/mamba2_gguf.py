"""Mamba-2's GGUF files, by the rules of llama.cpp.

Source: llama.cpp's `mamba2.cpp` and `mamba-base.cpp`, and the converter that writes such files (`conversion/mamba.py`).
Keys of attention and of MLPs are zeros, or missing. The heads are as many as steps (`ssm.time_step_rank`). Rates stand
there as A = -exp(A_log); rates, skips and the norm have an axis more than in the module, and the convolution one less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from transom.errors import CheckpointError
from transom.graphs.weight import Weight
from transom.zoo.architecture import GGUFFormat
from transom.zoo.checkpoints.gguf_config import Sizes
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.mamba2_config import Mamba2Config


def _heads(keys: Metadata) -> dict[str, int]:
    width, heads = keys.size("ssm.inner_size"), keys.size("ssm.time_step_rank")
    if width % heads:
        raise keys.refuse("ssm.time_step_rank", f"so many heads do not share a width of {width}: convert it again")
    return {
        "intermediate_size": width,
        "num_heads": heads,
        "num_kv_heads": keys.size("ssm.group_count"),
        "head_dim": width // heads,
    }


def _read(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """Every key must be there, as llama.cpp insists on it."""
    return {
        "depth": sizes.num_layers,
        "state_size": keys.size("ssm.state_size"),
        "taps": keys.size("ssm.conv_kernel"),
        "tied": "output.weight" not in sizes.header.tensors,
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
    }


def _shape(config: Mamba2Config, name: str) -> tuple[int, ...] | None:
    if name.endswith((".A_log", ".D")):
        return config.num_heads, 1
    if name.endswith(".conv1d.weight"):
        return config.channels, config.taps
    if name.endswith(".mixer.norm.weight"):
        return config.num_kv_heads, config.intermediate_size // config.num_kv_heads
    return None


def _rows(config: Mamba2Config, name: str) -> Callable[[Weight], Weight] | None:
    return _logarithms if name.endswith(".A_log") else None


def _logarithms(rates: Weight) -> Weight:
    """A_log of A, rounded to float32 once."""

    def convert(rows: torch.Tensor) -> torch.Tensor:
        # A NaN passes here: whoever reads refuses it.
        if bool((rows >= 0).any()):
            raise CheckpointError(
                f"{rates.origin} holds {float(rows.max()):g}, expected rates below zero: convert the model again"
            )
        return (-rows.double()).log().float()

    return rates.map_rows(convert)


GGUF = GGUFFormat(
    name="mamba2",
    neutral={
        **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "feed_forward_length"), (0,)),
        "ssm.dt_b_c_rms": (False,),
    },
    read=_read,
    tensors={
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "N.norm": "attn_norm",
        "mixer.in_proj": "ssm_in",
        "mixer.conv1d": "ssm_conv1d",
        "mixer.dt_bias": "ssm_dt.bias",
        "mixer.A_log": "ssm_a",
        "mixer.D": "ssm_d",
        "mixer.norm": "ssm_norm",
        "mixer.out_proj": "ssm_out",
    },
    rows=_rows,
    heads=_heads,
    shapes=_shape,
)
