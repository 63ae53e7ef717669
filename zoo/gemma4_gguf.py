"""Gemma 4's GGUF files, by the rules of llama.cpp.

Source: llama.cpp's `gemma4.cpp`, and the converter that writes such files (`conversion/gemma.py`). Lengths of keys are
those of global layers, and of local ones where a key ends in `_swa`. Whether values are keys no key says: global layers
then have no tensor for values. Pairs that do not turn have a frequency that is divided by 1e30.
"""

from __future__ import annotations

from typing import Any

import torch

from transom.zoo.architecture import GGUFFormat
from transom.zoo.checkpoints.gguf_config import USUAL_TENSORS, Sizes, read_gguf_windows
from transom.zoo.checkpoints.gguf_metadata import Metadata
from transom.zoo.checkpoints.gguf_tensors import FREQUENCIES
from transom.zoo.checkpoints.gguf_weight import read_vector
from transom.zoo.config import LayerKind
from transom.zoo.rope import ProportionalRope, Rope

_STILL = 1e30
_THETA = 1e4
"""What llama.cpp takes for either kind of layers where a file does not say."""
_PATTERN = "attention.sliding_window_pattern"


def _read(sizes: Sizes, keys: Metadata, lines: list[str]) -> dict[str, Any]:
    """Every key must be there that llama.cpp insists on."""
    if isinstance(keys.values.get(_PATTERN), int | type(None)):
        raise keys.refuse(_PATTERN, "expected whether each layer is local: convert the model again")
    keys.size("attention.sliding_window")
    kinds, window = read_gguf_windows(sizes, keys, lines, 1)
    keys.agree("attention.scale", 1.0)
    local_width = keys.size("attention.key_length_swa")
    for key, width in (
        ("attention.value_length_swa", local_width),
        ("rope.dimension_count", sizes.head_dim),
        ("rope.dimension_count_swa", local_width),
    ):
        if keys.size(key) != width:
            raise keys.refuse(key, f"but keys are {width} wide: another one is not supported, convert the model again")
    kv_heads = keys.sizes("attention.head_count_kv", sizes.blocks, sizes.num_kv_heads)[: sizes.num_layers]
    by_kind = {kind: {heads for heads, own in zip(kv_heads, kinds, strict=True) if own == kind} for kind in kinds}
    if any(len(counts) > 1 for counts in by_kind.values()):
        raise keys.refuse("attention.head_count_kv", "expected one number for local and one for global layers")
    local_heads, global_heads = (min(by_kind.get(kind, set(kv_heads))) for kind in ("local", "global"))
    if "tokenizer.ggml.suppress_tokens" in sizes.header.metadata:
        lines.append("tokenizer.ggml.suppress_tokens is not applied: tokens are sampled that llama.cpp rules out")
    return {
        "layer_kinds": kinds,
        "window": window,
        "head_dim": local_width,
        "num_kv_heads": local_heads,
        "global_head_dim": sizes.head_dim,
        "global_kv_heads": global_heads,
        "keys_as_values": _keys_as_values(sizes, keys, kinds),
        "rope_local": Rope(theta=keys.number("rope.freq_base_swa", _THETA)),
        "rope_global": _global_rope(sizes, keys, lines, kinds),
        **_shared(sizes, keys, kinds),
        "layer_embedding": keys.size("embedding_length_per_layer_input", minimum=0),
        **_experts(keys),
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "logit_softcap": keys.number("final_logit_softcapping", 0.0, zero=True) or None,
    }


def _keys_as_values(sizes: Sizes, keys: Metadata, kinds: tuple[LayerKind, ...]) -> bool:
    unshared = sizes.num_layers - keys.size("attention.shared_kv_layers", 0, minimum=0)
    owners = [index for index, kind in enumerate(kinds[: max(unshared, 0)]) if kind == "global"]
    return bool(owners) and not any(f"blk.{index}.attn_v.weight" in sizes.header.tensors for index in owners)


def _global_rope(sizes: Sizes, keys: Metadata, lines: list[str], kinds: tuple[LayerKind, ...]) -> Rope:
    """The first pairs turn; how many, a vector of divisors says."""
    theta, factor = keys.number("rope.freq_base", _THETA), keys.rope_factor(lines) or 1.0
    divisors = read_vector(sizes.header, FREQUENCIES)
    if divisors is None and "global" not in kinds:
        return Rope(theta=theta, factor=factor)
    pairs = sizes.head_dim // 2
    turning = 0 if divisors is None else int((divisors == 1).sum())
    rope = ProportionalRope(theta=theta, factor=factor, fraction=turning / pairs)
    wanted = torch.tensor([1.0] * turning + [_STILL] * (pairs - turning))
    turns = int(rope.frequencies(sizes.head_dim).count_nonzero())
    if divisors is None or not turning or turns != turning or not torch.equal(divisors, wanted):
        raise keys.refuse(
            "rope.freq_base",
            f"and {FREQUENCIES} is not what says how many of {pairs} pairs turn, the first ones, with divisors of 1, "
            "and of 1e30 for the others: convert the model again",
        )
    return rope


def _shared(sizes: Sizes, keys: Metadata, kinds: tuple[LayerKind, ...]) -> dict[str, Any]:
    """Layers that read others' keys and values, and the width of their MLPs."""
    shared = keys.size("attention.shared_kv_layers", 0, minimum=0)
    unshared = sizes.num_layers - shared
    # llama.cpp reads the last two layers that keep their own, whatever they are.
    if shared and (unshared < 2 or kinds[unshared - 2 : unshared] != ("local", "global")):
        raise keys.refuse(
            "attention.shared_kv_layers", "expected a local and a global layer as the last ones that keep their own"
        )
    widths = keys.sizes("feed_forward_length", sizes.blocks)[: sizes.num_layers]
    wide = bool(shared) and widths[-1] == 2 * widths[0]
    if widths != (widths[0],) * unshared + (widths[0] * (2 if wide else 1),) * shared:
        raise keys.refuse("feed_forward_length", "expected one width, or twice that in layers that read others' keys")
    return {"shared_layers": shared, "intermediate_size": widths[0], "wide_shared": wide}


def _experts(keys: Metadata) -> dict[str, int]:
    if not (experts := keys.size("expert_count", 0, minimum=0)):
        return {}
    chosen, size = keys.size("expert_used_count"), keys.size("expert_feed_forward_length")
    return {"experts": experts, "chosen": chosen, "expert_size": size}


GGUF = GGUFFormat(
    name="gemma4",
    neutral={"hidden_activation": ("gelu_pytorch_tanh",), "attn_logit_softcapping": (0,)},
    read=_read,
    tensors={
        **{name: in_file for name, in_file in USUAL_TENSORS.items() if name != "lm_head"},
        "embed_tokens_per_layer": "per_layer_token_embd",
        "per_layer_model_projection": "per_layer_model_proj",
        "per_layer_projection_norm": "per_layer_proj_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
        "layer_scalar": "layer_output_scale.weight",
    },
    apart={"experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight")},
    rows=lambda config, name: None,
    frequencies=True,
    uneven=("attention.head_count_kv", "feed_forward_length"),
)
