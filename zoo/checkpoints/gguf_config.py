"""A configuration out of a GGUF file's metadata, by the rules of llama.cpp.

Source: llama.cpp's loader (`load_hparams` and the file of each architecture). What it takes for every family when a key
is missing:
    - head_count_kv: head_count. key_length, value_length: embedding_length / head_count. rope.dimension_count: the
      key length.
    - rope.scaling.type: linear. rope.scaling.factor: the old key rope.scale_linear; neither, or zero: no scaling.
What it takes for one family stands in that model's file.

Every key that bears on numbers is honoured, or must have the one value that changes nothing, or is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from transom.errors import CheckpointError, ConfigError
from transom.graphs.weight import Weight
from transom.wording import listed
from transom.zoo.architecture import Architecture, GGUFFormat
from transom.zoo.architectures import architectures
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_metadata import Metadata, shown
from transom.zoo.checkpoints.gguf_weight import read_vector
from transom.zoo.config import LARGEST, DecoderConfig, LayerKind, read_decoder, tile
from transom.zoo.rope import Llama3Rope, Rope, YarnRope, yarn_magnitude

PARTS_OF_KEYS = ("vision.", "mm.", "audio.")
"""Keys (without the architecture) that describe a part beside the language model; see `gguf_tensors.PARTS`."""

# Keys of computations that no family has, and the values that say so.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
} | dict.fromkeys(
    (
        "router_logit_softcapping", "attention.max_alibi_bias", "attention.clamp_kqv",
        "attention.relative_buckets_count", "attention.shared_kv_layers", "attention.q_lora_rank",
        "attention.kv_lora_rank", "attention.output_scale", "attention.value_scale", "embedding_scale",
        "expert_count", "expert_used_count", "expert_shared_count", "expert_group_count", "expert_group_used_count",
        "expert_feed_forward_length", "leading_dense_block_count", "rope.scaling.alpha",
        "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor",
    ),
    (0,),
)  # fmt: skip

# An unknown key with one of these words is about numbers for all we know.
_BEARS_ON_NUMBERS = re.compile(
    "att|rope|rotary|norm|eps|expert|moe|cap|scal|residual|act|bias|window|layer|block|head|kv|length|embed|ffn|feed|"
    "theta|freq|base|lora|adapter|ssm|conv|alpha|beta|factor|multiplier|tensor|layout|loop|logit|router|gate|dim|rank|"
    "clamp|temp|position|causal|width|depth|size"
)
# Read by llama.cpp for other purposes than text, or bearing on nothing: listed.
_HARMLESS = re.compile(r"pooling_type|classifier\..*|dense_[23]_feat_(in|out)")
_OTHER_NAMESPACES = ("general.", "tokenizer.", "split.", "quantize.", "clip.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the metadata of every family say alike; fields of a `DecoderConfig`, and more.

    Attributes:
        blocks: Layers of the file; the last of them may be no part of the decoder.
        num_layers: Layers of the decoder.
        header: Of the file.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    blocks: int
    num_layers: int
    header: Header

    def fields(self) -> dict[str, int]:
        """Those of a `DecoderConfig`."""
        beside = ("blocks", "num_layers", "header")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in beside}


def read_metadata(header: Header) -> tuple[DecoderConfig, tuple[str, ...]]:
    """The configuration, and in plain words what in the metadata it does not reflect.

    Raises:
        ConfigError: If the metadata is incomplete or describes a model that the zoo does not hold.
        CheckpointError: If the embedding is missing, whose rows are the vocabulary, or contradicts the metadata.
    """
    family = architecture_of(header)
    form = gguf_format(family)
    keys = Metadata(header, form.name)
    lines: list[str] = []
    sizes = _sizes(header, keys, form)
    fields = {**sizes.fields(), **form.read(sizes, keys, lines)}
    config = read_decoder(header.path, family.config, name=header.name, architecture=family.name, **fields)
    _check_agreement(keys, config, form)
    lines += _judge_others(header, keys)
    return config, tuple(lines)


def gguf_format(family: Architecture) -> GGUFFormat:
    """Format of the GGUF files of a family that has them, which all do whose files were opened."""
    assert family.gguf is not None, family.name
    return family.gguf


def _sizes(header: Header, keys: Metadata, form: GGUFFormat) -> Sizes:
    blocks = keys.size("block_count")
    if blocks > LARGEST["num_layers"]:
        raise keys.refuse("block_count", f"more than {LARGEST['num_layers']:,} layers: convert the model again")
    # The last blocks may predict tokens further ahead; they are no part of the decoder.
    num_layers = blocks - keys.size("nextn_predict_layers", 0, minimum=0)
    if num_layers < 1:
        raise keys.refuse("nextn_predict_layers", f"which leaves none of {blocks} layers: convert the model again")
    hidden_size = keys.size("embedding_length")
    heads = _heads(keys, form, blocks, hidden_size) if form.heads is None else form.heads(keys)
    return Sizes(
        vocab_size=_vocab_size(header, hidden_size),
        hidden_size=hidden_size,
        **heads,
        context=keys.size("context_length"),
        blocks=blocks,
        num_layers=num_layers,
        header=header,
    )


def _heads(keys: Metadata, form: GGUFFormat, blocks: int, hidden_size: int) -> dict[str, int]:
    """Sizes of heads that attend, and of MLPs."""
    path = keys.path

    def in_layers(key: str, default: int | None = None) -> int:
        """One size for all layers, or the first layer's where they may differ."""
        uneven = key in form.uneven
        return keys.sizes(key, blocks, default)[0] if uneven else keys.same_size_in_every_layer(key, blocks, default)

    num_heads = in_layers("attention.head_count")
    per_head = max(hidden_size // num_heads, 1)
    head_dim = keys.size("attention.key_length", per_head)
    if (value_dim := keys.size("attention.value_length", per_head)) != head_dim:
        stated = "" if "attention.value_length" in keys else ", the default of a missing attention.value_length"
        raise ConfigError(
            f"{path}: keys and values differ in length ({head_dim} and {value_dim}{stated}): "
            "such attention is not supported, choose another model"
        )
    if head_dim % 2:
        raise ConfigError(
            f"{path}: heads of {head_dim} ({keys.prefix}attention.key_length) cannot be rotated in pairs: "
            "convert the model again"
        )
    num_kv_heads = in_layers("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{path}: {num_heads} query heads cannot share {num_kv_heads} kv heads "
            f"({keys.prefix}attention.head_count_kv): convert the model again"
        )
    if num_heads * head_dim >= 2**31:
        raise keys.refuse("attention.head_count", f"too many heads of {head_dim}: convert the model again")
    return {
        "intermediate_size": in_layers("feed_forward_length"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }


def architecture_of(header: Header) -> Architecture:
    """The family that a file says it is of.

    Raises:
        ConfigError: If it is no whole model, or the zoo does not hold its family.
    """
    path, metadata = header.path, header.metadata
    kind = metadata.get("general.type", "model")
    advice = {
        "adapter": "merge the adapter into its model first",
        "mmproj": "give the file of the language model",
        "imatrix": "give the file of the language model",
    }
    # Arrays are compared by element, so that a kind must be a string first.
    if not isinstance(kind, str) or kind != "model":
        what = advice.get(str(kind), "give the file of a whole model")
        raise ConfigError(f"{path}: general.type is {shown(kind)}, expected 'model': {what}")
    if adapter := next((key for key in metadata if key.startswith("adapter.")), None):
        raise ConfigError(f"{path}: {adapter} says that it is an adapter: {advice['adapter']}")
    architecture = metadata.get("general.architecture")
    texts = [family for family in architectures() if family.text is None]
    families = {family.gguf.name: family for family in texts if family.gguf is not None}
    if not isinstance(architecture, str) or architecture not in families:
        what = advice["mmproj"] if str(architecture) == "clip" else "choose another model"
        if architecture in [family.name for family in architectures() if family.gguf is None]:
            what = "such files are not read, give the Hugging Face folder of the model"
        raise ConfigError(
            f"{path}: unknown architecture {shown(architecture)}: known are {', '.join(families)} "
            f"(general.architecture): {what}"
        )
    return families[architecture]


def _format(family: Architecture) -> GGUFFormat:
    assert family.gguf is not None, f"{family.name} has no GGUF files"
    return family.gguf


def _vocab_size(header: Header, hidden_size: int) -> int:
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path}: token_embd.weight is missing: give the file of the language model")
    shape = header.tensors["token_embd.weight"].shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != hidden_size:
        raise CheckpointError(
            f"{header.path}: token_embd.weight has shape {list(shape)}, expected rows of {hidden_size} "
            "(embedding_length): the file contradicts its metadata, convert it again"
        )
    return shape[0]


def _check_agreement(keys: Metadata, config: DecoderConfig, form: GGUFFormat) -> None:
    """Keys that say again what others say."""
    sizes = {
        "vocab_size": config.vocab_size,
        "embedding_length_out": config.hidden_size,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.dimension_count_swa": config.head_dim,
    }
    for key, size in sizes.items():
        # What the family reads it has judged.
        if key in keys.unread and keys.size(key) != size:
            raise keys.refuse(key, f"but the model has {size}: another one is not supported, convert the model again")
    keys.agree("attention.layer_norm_epsilon", config.norm_eps)
    if "rope.scaling.original_context_length" in keys:
        keys.size("rope.scaling.original_context_length", minimum=0)
    if "rope.scaling.finetuned" in keys and not isinstance(keys.values["rope.scaling.finetuned"], bool):
        raise keys.refuse("rope.scaling.finetuned", "expected true or false: convert the model again")
    keys.unread.discard("rope.scaling.finetuned")
    for key, allowed in {**_NEUTRAL, **form.neutral}.items():
        # What the family reads is a computation that it has.
        if key in keys.unread:
            keys.only(key, allowed)


def _judge_others(header: Header, keys: Metadata) -> list[str]:
    others = sorted(key for key in keys.unread if not key.startswith(PARTS_OF_KEYS))
    concerned = [key for key in others if _BEARS_ON_NUMBERS.search(key) and not _HARMLESS.fullmatch(key)]
    return judge(header, keys, others, concerned)


def judge(header: Header, keys: Metadata, others: list[str], concerned: list[str]) -> list[str]:
    """In plain words, the keys that nothing reads: some of its prefix, and those of no known one.

    Args:
        header: Of the file.
        keys: Its keys under its prefix.
        others: Those of them that nothing reads.
        concerned: Those of these that bear on numbers.

    Raises:
        ConfigError: If there are such.
    """
    if concerned:
        names = listed([f"{keys.prefix}{key} ({shown(keys.values[key])})" for key in concerned])
        raise ConfigError(
            f"{keys.path}: metadata that the model has no use for, but that may change its numbers: {names}: "
            "choose another model"
        )
    unread = [keys.prefix + key for key in others]
    unread += [key for key in header.metadata if not key.startswith((keys.prefix, *_OTHER_NAMESPACES))]
    return [f"metadata that the model has no use for: {', '.join(unread)}"] if unread else []


def read_gguf_windows(
    sizes: Sizes, keys: Metadata, lines: list[str], pattern: int, *, window: int = 0
) -> tuple[tuple[LayerKind, ...], int | None]:
    """Kinds of layers, and the window of the local ones; without one, every layer is global.

    Args:
        sizes: Of the model.
        keys: Of the file.
        lines: Gets one if layers are global for want of a window.
        pattern: Every n-th layer is global, where the file does not say; it may say another n, or whether each layer is
            local.
        window: What llama.cpp takes where the file says none; 0 for none.

    Raises:
        ConfigError: If the kinds do not fit the layers.
    """
    key, num_layers = "attention.sliding_window_pattern", sizes.num_layers
    stated = keys.values.get(key, pattern)
    wrong = keys.refuse(key, f"which does not fit {sizes.blocks} layers: convert the model again")
    kinds: tuple[LayerKind, ...]
    if isinstance(stated, np.ndarray | list):
        flags = np.asarray(stated)
        if flags.dtype.kind not in "biu" or flags.shape != (sizes.blocks,) or not np.isin(flags, (0, 1)).all():
            raise wrong
        kinds = tuple("local" if flag else "global" for flag in flags[:num_layers].tolist())
    elif isinstance(stated, int) and not isinstance(stated, bool) and 0 < stated < 2**31:
        kinds = tuple("global" if (index + 1) % stated == 0 else "local" for index in range(num_layers))
    else:
        raise wrong
    slots = keys.size("attention.sliding_window", window, minimum=0) or None
    if slots is None and "local" in kinds:
        what = "zero" if "attention.sliding_window" in keys else "missing"
        lines.append(f"{keys.prefix}attention.sliding_window is {what}: every layer is global, as llama.cpp takes it")
        kinds = tile("G", num_layers)
    return kinds, slots


def read_gguf_rope(sizes: Sizes, keys: Metadata, lines: list[str]) -> Rope:
    """What llama.cpp takes: a theta of 10,000 if the key is missing. Llama 3.1's scaling stands in a tensor.

    For YaRN it takes the context, bounds of 32 and 1, and no multiplier, where those keys are missing.

    Args:
        sizes: Of the model.
        keys: Of the file.
        lines: As `Metadata.rope_factor` takes it.

    Raises:
        ConfigError: If the keys contradict each other, or positions are scaled in another way.
        CheckpointError: If the tensor is damaged.
    """
    theta = keys.number("rope.freq_base", 1e4)
    if keys.values.get("rope.scaling.type") == "yarn":
        rope = _yarn(theta, sizes, keys)
    else:
        rope = Rope(theta=theta, factor=keys.rope_factor(lines) or 1.0)
    divisors = read_vector(sizes.header, "rope_freqs.weight")
    return rope if divisors is None else _scaled(sizes, rope, divisors)


def _yarn(theta: float, sizes: Sizes, keys: Metadata) -> Rope:
    keys.unread.discard("rope.scaling.type")
    # Its own weight of what is not interpolated; another one is no YaRN.
    keys.only("rope.scaling.yarn_ext_factor", (1, -1))
    factor, weight = keys.number("rope.scaling.factor"), keys.number("rope.scaling.yarn_log_multiplier", 0.0, zero=True)
    slow, fast = keys.number("rope.scaling.yarn_beta_slow", 1.0), keys.number("rope.scaling.yarn_beta_fast", 32.0)
    if slow >= fast:
        raise keys.refuse("rope.scaling.yarn_beta_slow", f"expected less than yarn_beta_fast, {fast:g}")
    if theta <= 1:
        raise keys.refuse("rope.freq_base", "expected more than 1, as pairs slow down with their index")
    # OLMo 3's files state the multiplier of cosines and sines, as config.json does; llama.cpp takes it times its own.
    stated = keys.number("rope.scaling.attn_factor", 1.0)
    if not any(math.isclose(stated, usual, rel_tol=1e-5) for usual in (1.0, yarn_magnitude(factor))):
        raise keys.refuse("rope.scaling.attn_factor", f"expected 1 or YaRN's own, {yarn_magnitude(factor):.7g}")
    return YarnRope(
        theta=theta,
        factor=factor,
        original_context=keys.size("rope.scaling.original_context_length", sizes.context),
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=yarn_magnitude(factor) / yarn_magnitude(factor, weight) if weight else None,
    )


def _scaled(sizes: Sizes, rope: Rope, divisors: torch.Tensor) -> Rope:
    """The scaling whose frequencies are a rope's divided by some numbers, which is all that a file stores of it."""
    plain = rope.frequencies(sizes.head_dim, dtype=torch.float64)
    scaled = Llama3Rope(theta=rope.theta, factor=float(divisors.max()))
    for candidate in (Rope(theta=rope.theta), scaled):
        if divisors.shape == plain.shape and rope == Rope(theta=rope.theta):
            wanted = plain / candidate.frequencies(sizes.head_dim, dtype=torch.float64)
            if torch.allclose(divisors.double(), wanted, rtol=1e-5):
                return candidate
    raise ConfigError(
        f"{sizes.header.path}: rope_freqs.weight scales positions in another way than Llama 3.1 does (slow pairs by "
        "one factor, within 8,192 tokens of original context): choose another model"
    )


def neighbours_to_halves(config: DecoderConfig, name: str) -> Callable[[Weight], Weight] | None:
    """Rows of queries and keys as pairs (i, i + H/2), where a file stores those pairs as neighbours, to rotate them."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    half = config.head_dim // 2
    order = tuple(2 * index + side for side in (0, 1) for index in range(half))
    return lambda weight: weight.reorder_rows(order)


USUAL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("silu",),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
}
"""Keys and values of families with SiLU and no soft caps; see `GGUFFormat.neutral`."""

USUAL_TENSORS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of what most families have, less the norms of layers; see `GGUFFormat.tensors`."""
