"""RWKV-7's GGUF files, by the rules of llama.cpp.

Source: llama.cpp's `rwkv7.cpp` and `rwkv7-base.cpp`, and the converter that writes such files (`conversion/rwkv.py`).
Heads go by their width (`wkv.head_size`); `attention.head_count` is a zero that nothing reads. The six mixes of a
layer's first half are one tensor, in the order r, w, k, v, a, g. The first layer has ranks of values too, which are a
copy of its rates' and read by nothing. Low ranks stand as matrices of `nn.Linear`, whatever the converter got.
"""

from __future__ import annotations

from typing import Any

from transom.zoo.architecture import GGUFFormat
from transom.zoo.checkpoints.gguf_config import Sizes
from transom.zoo.checkpoints.gguf_metadata import Metadata

_HEAD_EPS = 64e-5
"""What llama.cpp adds to variances of heads, whatever the file says; the module adds `head_dim * norm_eps`."""

_EPS = "attention.layer_norm_epsilon"


def _heads(keys: Metadata) -> dict[str, int]:
    width, head_dim = keys.size("embedding_length"), keys.size("wkv.head_size")
    heads, rest = divmod(width, head_dim)
    if rest:
        raise keys.refuse("wkv.head_size", f"which does not divide a width of {width}: convert the model again")
    keys.only("attention.head_count", (0, heads))
    return {
        "intermediate_size": keys.size("feed_forward_length"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
    }


def _read(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    eps = keys.number(_EPS)
    if abs(sizes.head_dim * eps - _HEAD_EPS) > 1e-6 * _HEAD_EPS:
        raise keys.refuse(
            _EPS,
            f"so that heads of {sizes.head_dim} are normalised with {sizes.head_dim * eps:.3g}, but llama.cpp takes "
            f"{_HEAD_EPS:g} for them: give the Hugging Face folder of the model",
        )
    keys.only("token_shift_count", (2,))
    return {
        "depth": sizes.num_layers,
        "decay_rank": keys.size("attention.decay_lora_rank"),
        "rate_rank": keys.size("attention.iclr_lora_rank"),
        "value_rank": keys.size("attention.value_residual_mix_lora_rank"),
        "gate_rank": keys.size("attention.gate_lora_rank"),
        "norm_eps": eps,
    }


def _shape(config: Any, name: str) -> tuple[int, ...] | None:
    if ".attn.x_" in name:
        return 6, 1, 1, config.hidden_size
    return (config.hidden_size,) if name.endswith(".r_k") else None


def _low_rank(module: str, in_file: str) -> dict[str, str]:
    return {
        f"attn.{module}.lora.0.weight": f"time_mix_{in_file}1.weight",
        f"attn.{module}.lora.2.weight": f"time_mix_{in_file}2.weight",
        f"attn.{module}.lora.2.bias": f"time_mix_{in_file}0.weight",
    }


GGUF = GGUFFormat(
    name="rwkv7",
    neutral={"rescale_every_n_layers": (0,)},
    read=_read,
    tensors={
        "embed_tokens": "token_embd",
        "layers.0.pre_norm": "token_embd_norm",
        "norm": "output_norm",
        "lm_head": "output",
        "attn_norm": "attn_norm",
        "ffn_norm": "attn_norm_2",
        **{f"attn.x_{use}": "time_mix_lerp_fused.weight" for use in "rwkvag"},
        **{f"attn.{name}": f"time_mix_{name}.weight" for name in ("k_k", "k_a", "r_k")},
        "attn.r_proj": "time_mix_receptance",
        "attn.k_proj": "time_mix_key",
        "attn.v_proj": "time_mix_value",
        "attn.o_proj": "time_mix_output",
        **{name: in_file for rank in "wavg" for name, in_file in _low_rank(f"{rank}_lora", rank).items()},
        "attn.g_norm": "time_mix_ln",
        "ffn.x_k": "channel_mix_lerp_k.weight",
        "ffn.key": "channel_mix_key",
        "ffn.value": "channel_mix_value",
    },
    rows=lambda config, name: None,
    heads=_heads,
    shapes=_shape,
)
