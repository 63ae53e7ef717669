"""A configuration out of a GGUF file's metadata, by the rules of llama.cpp.

Source: llama.cpp's loader (`load_hparams` and the file of each architecture). What it takes when a key is missing:
    - head_count_kv: head_count. key_length, value_length: embedding_length / head_count. rope.dimension_count: the
      key length. rope.freq_base: 10,000, although Gemma 3's global layers have a million. rope.freq_base_swa: 10,000.
    - rope.scaling.type: linear. rope.scaling.factor: the old key rope.scale_linear; neither, or zero: no scaling.
      Scaling concerns global layers only.
    - attention.sliding_window: none, so that every layer is global, with the global theta; zero says the same.
    - attention.sliding_window_pattern: every 6th layer is global.
    - attention scale: never stored. Only the 27B, known by its 62 layers, scales by the width per query head (168).
Files of Ollama write rope.global.freq_base and rope.local.freq_base, and leave out what Gemma 3 always has: an epsilon
of 1e-06, a theta of a million, and from a context of 131,072 on a scaling by 8.

Every key that bears on numbers is honoured, or must have the one value that changes nothing, or is refused by name.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from transom.errors import CheckpointError, ConfigError
from transom.wording import listed
from transom.zoo.checkpoints.gguf_header import Header
from transom.zoo.checkpoints.gguf_metadata import Metadata, shown
from transom.zoo.config import LARGEST, DecoderConfig, LayerKind, Rope, read_decoder, tile

ARCHITECTURES = ("gemma3",)
"""Architectures of GGUF files that the zoo holds; each is also the prefix of its keys."""

PARTS_OF_KEYS = ("vision.", "mm.", "audio.")
"""Keys (without the architecture) that describe a part beside the language model; see `gguf_tensors.PARTS`."""

# Ollama's keys, which tell its files from llama.cpp's.
_OLLAMA = ("rope.global.freq_base", "rope.local.freq_base", "mm.tokens_per_image", "vision.block_count")
_OLLAMA_LONG_CONTEXT = 131_072

# Keys of computations that Gemma 3 does not have, and the values that say so.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
} | dict.fromkeys(
    (
        "attn_logit_softcapping", "router_logit_softcapping", "attention.max_alibi_bias", "attention.clamp_kqv",
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


def read_metadata(header: Header) -> tuple[DecoderConfig, tuple[str, ...]]:
    """The configuration, and in plain words what in the metadata it does not reflect.

    Raises:
        ConfigError: If the metadata is incomplete or describes a model that the zoo does not hold.
        CheckpointError: If the embedding is missing, whose rows are the vocabulary, or contradicts the metadata.
    """
    path = header.path
    architecture = _architecture(header)
    keys = Metadata(header, architecture)
    lines: list[str] = []
    blocks = keys.size("block_count")
    if blocks > LARGEST["num_layers"]:
        raise keys.refuse("block_count", f"more than {LARGEST['num_layers']:,} layers: convert the model again")
    # The last blocks may predict tokens further ahead; they are no part of the decoder.
    num_layers = blocks - keys.size("nextn_predict_layers", 0, minimum=0)
    if num_layers < 1:
        raise keys.refuse("nextn_predict_layers", f"which leaves none of {blocks} layers: convert the model again")
    hidden_size = keys.size("embedding_length")
    num_heads = keys.same_size_in_every_layer("attention.head_count", blocks)
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
    num_kv_heads = keys.same_size_in_every_layer("attention.head_count_kv", blocks, num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{path}: {num_heads} query heads cannot share {num_kv_heads} kv heads "
            f"({keys.prefix}attention.head_count_kv): convert the model again"
        )
    if num_heads * head_dim >= 2**31:
        raise keys.refuse("attention.head_count", f"too many heads of {head_dim}: convert the model again")
    ollama = any(key in keys for key in _OLLAMA)
    kinds = _layer_kinds(keys, blocks, num_layers, lines)
    context = keys.size("context_length")
    theta_local, theta_global = _thetas(keys, lines, ollama=ollama)
    config = read_decoder(
        path,
        name=header.name,
        architecture=architecture,
        vocab_size=_vocab_size(header, hidden_size),
        hidden_size=hidden_size,
        intermediate_size=keys.same_size_in_every_layer("feed_forward_length", blocks),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layer_kinds=kinds,
        # A model without local layers has no window; the context is one that hides nothing.
        window=keys.size("attention.sliding_window", 0, minimum=0) or context,
        rope_local=Rope(theta=theta_local),
        rope_global=Rope(theta=theta_global, factor=_rope_factor(keys, lines, ollama=ollama, context=context)),
        attention_scale=(hidden_size // num_heads if num_layers == 62 else head_dim) ** -0.5,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-6 if ollama else None),
        context=context,
        logit_softcap=keys.number("final_logit_softcapping", 0.0, zero=True) or None,
    )
    _check_agreement(keys, config)
    lines += _judge_others(header, keys)
    return config, tuple(lines)


def _architecture(header: Header) -> str:
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
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        what = advice["mmproj"] if str(architecture) == "clip" else "choose another model"
        raise ConfigError(
            f"{path}: unknown architecture {shown(architecture)}: known are {', '.join(ARCHITECTURES)} "
            f"(general.architecture): {what}"
        )
    return architecture


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


def _layer_kinds(keys: Metadata, blocks: int, num_layers: int, lines: list[str]) -> tuple[LayerKind, ...]:
    """Kinds from the metadata: every n-th layer is global, or whether each layer is local. Most files say nothing."""
    key = "attention.sliding_window_pattern"
    pattern = keys.values.get(key, 6)
    keys.unread.discard(key)
    wrong = keys.refuse(key, f"which does not fit {blocks} layers: convert the model again")
    kinds: tuple[LayerKind, ...]
    if isinstance(pattern, np.ndarray | list):
        flags = np.asarray(pattern)
        if flags.dtype.kind not in "biu" or flags.shape != (blocks,) or not np.isin(flags, (0, 1)).all():
            raise wrong
        kinds = tuple("local" if flag else "global" for flag in flags[:num_layers].tolist())
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and 0 < pattern < 2**31:
        kinds = tuple("global" if (index + 1) % pattern == 0 else "local" for index in range(num_layers))
    else:
        raise wrong
    if keys.size("attention.sliding_window", 0, minimum=0) == 0 and "local" in kinds:
        stated = "zero" if "attention.sliding_window" in keys else "missing"
        lines.append(f"{keys.prefix}attention.sliding_window is {stated}: every layer is global, as llama.cpp takes it")
        return tile("G", num_layers)
    return kinds


def _thetas(keys: Metadata, lines: list[str], *, ollama: bool) -> tuple[float, float]:
    """Bases of the local and the global layers."""
    local = _theta(keys, "rope.freq_base_swa", "rope.local.freq_base")
    theta = _theta(keys, "rope.freq_base", "rope.global.freq_base")
    if theta is None:
        theta = 1e6 if ollama else 1e4
        lines.append(
            f"{keys.prefix}rope.freq_base is missing: {theta:.0f}, as {'Ollama' if ollama else 'llama.cpp'} takes it"
        )
    return (1e4 if local is None else local), theta


def _theta(keys: Metadata, name: str, of_ollama: str) -> float | None:
    stated = {key: keys.number(key) for key in (name, of_ollama) if key in keys}
    if len(set(stated.values())) > 1:
        raise keys.refuse(of_ollama, f"but {name} is {stated[name]}: they must agree, convert the model again")
    return next(iter(stated.values()), None)


def _rope_factor(keys: Metadata, lines: list[str], *, ollama: bool, context: int) -> float:
    kind = keys.string("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise keys.refuse("rope.scaling.type", "only none and linear are known: choose another model")
    names = [key for key in ("rope.scaling.factor", "rope.scale_linear") if key in keys]
    factors = {key: keys.number(key, zero=True) or 1.0 for key in names}
    if len(set(factors.values())) > 1:
        raise keys.refuse("rope.scale_linear", "but rope.scaling.factor differs: convert the model again")
    if not factors and ollama and context >= _OLLAMA_LONG_CONTEXT and "rope.scaling.type" not in keys:
        lines.append(f"{keys.prefix}rope.scaling.factor is missing: 8, as Ollama takes it at this context length")
        return 8.0
    factor = next(iter(factors.values()), 1.0)
    if kind == "none" and factor != 1:
        lines.append(f"{keys.prefix}{names[0]} is {factor}, but rope.scaling.type is none: nothing is scaled")
        return 1.0
    return factor


def _check_agreement(keys: Metadata, config: DecoderConfig) -> None:
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
        if key in keys and keys.size(key) != size:
            raise keys.refuse(key, f"but the model has {size}: another one is not supported, convert the model again")
    numbers = {"attention.scale": config.attention_scale, "attention.layer_norm_epsilon": config.norm_eps}
    for key, number in numbers.items():
        if key in keys and abs(keys.number(key) - number) > 1e-6 * number:
            raise keys.refuse(key, f"but llama.cpp takes {number:.7g}: another one is not supported")
    if "rope.scaling.original_context_length" in keys:
        keys.size("rope.scaling.original_context_length", minimum=0)
    if "rope.scaling.finetuned" in keys and not isinstance(keys.values["rope.scaling.finetuned"], bool):
        raise keys.refuse("rope.scaling.finetuned", "expected true or false: convert the model again")
    keys.unread.discard("rope.scaling.finetuned")
    for key, allowed in _NEUTRAL.items():
        value = keys.values.get(key, allowed[0])
        # True is 1 to Python, but a flag that is a number is a damaged file.
        if isinstance(value, bool) != isinstance(allowed[0], bool) or not any(_equal(value, one) for one in allowed):
            only = " or ".join(map(repr, allowed))
            raise keys.refuse(key, f"only {only} is supported: choose another model")
        keys.unread.discard(key)


def _equal(value: object, allowed: object) -> bool:
    return isinstance(value, bool | int | float | str) and value == allowed


def _judge_others(header: Header, keys: Metadata) -> list[str]:
    others = sorted(key for key in keys.unread if not key.startswith(PARTS_OF_KEYS))
    if concerned := [key for key in others if _BEARS_ON_NUMBERS.search(key) and not _HARMLESS.fullmatch(key)]:
        names = listed([f"{keys.prefix}{key} ({shown(keys.values[key])})" for key in concerned])
        raise ConfigError(
            f"{keys.path}: metadata that Gemma 3 has no use for, but that may change its numbers: {names}: "
            "choose another model"
        )
    unread = [keys.prefix + key for key in others]
    unread += [key for key in header.metadata if not key.startswith((keys.prefix, *_OTHER_NAMESPACES))]
    return [f"metadata that the model has no use for: {', '.join(unread)}"] if unread else []
