"""Writes small GGUF files with the `gguf` package: an author of the format other than our reader."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from transom.graphs.weight import Weight
from transom.zoo.architectures import architecture as architecture_of
from transom.zoo.checkpoints.gguf_config import gguf_format
from transom.zoo.checkpoints.layout import in_file as in_checkpoint
from transom.zoo.cohere2 import Cohere2Config
from transom.zoo.config import DecoderConfig, LocalGlobalConfig, tile
from transom.zoo.exaone4 import Exaone4Config
from transom.zoo.gemma2 import Gemma2Config
from transom.zoo.gemma3 import Gemma3Config
from transom.zoo.gemma3_vision import Gemma3VisionConfig
from transom.zoo.gemma4_config import Gemma4Config
from transom.zoo.gpt_oss import GptOssConfig
from transom.zoo.llama3 import Llama3Config
from transom.zoo.mamba2_config import Mamba2Config
from transom.zoo.ministral3 import Ministral3Config
from transom.zoo.olmo3 import Olmo3Config
from transom.zoo.qwen2 import Qwen2Config
from transom.zoo.qwen3 import Qwen3Config
from transom.zoo.rope import Llama3Rope, ProportionalRope, Rope, YarnRope
from transom.zoo.rwkv7 import RWKV7Config
from transom.zoo.smollm3 import SmolLM3Config

TINY = Gemma3Config(
    name="tiny",
    architecture="gemma3",
    vocab_size=300,
    hidden_size=256,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    layer_kinds=tile("LLLLLG", 7),
    window=16,
    rope_local=Rope(theta=1e4),
    rope_global=Rope(theta=1e6, factor=8.0),
    attention_scale=64**-0.5,
    context=512,
)


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "context": 512,
}

STORABLE: dict[str, DecoderConfig] = {
    "gemma3": TINY,
    "llama3": Llama3Config(
        name="tiny",
        layer_kinds=tile("G", 2),
        rope=Llama3Rope(theta=5e5, factor=8.0),
        tied=False,
        **SIZES,
    ),
    "gemma2": Gemma2Config(
        name="tiny",
        layer_kinds=tile("LG", 3),
        window=16,
        rope=Rope(theta=1e4),
        query_scalar=64,
        attention_softcap=5.0,
        logit_softcap=None,
        **SIZES,
    ),
    "gemma4": Gemma4Config(
        name="tiny",
        layer_kinds=tile("LLG", 5),
        window=16,
        rope_local=Rope(theta=2e4),
        rope_global=ProportionalRope(theta=1e6, fraction=0.25),
        global_kv_heads=1,
        global_head_dim=128,
        keys_as_values=True,
        shared_layers=2,
        wide_shared=True,
        layer_embedding=32,
        experts=4,
        chosen=2,
        expert_size=32,
        logit_softcap=30.0,
        **SIZES,
    ),
    "olmo3": Olmo3Config(
        name="tiny",
        layer_kinds=tile("LLG", 3),
        window=16,
        rope_local=Rope(theta=5e5),
        rope_global=Rope(theta=5e5, factor=8.0),
        **SIZES,
    ),
    "exaone4": Exaone4Config(
        name="tiny",
        layer_kinds=tile("LG", 2),
        window=16,
        rope=Llama3Rope(theta=1e6, factor=16.0),
        tied=False,
        **SIZES,
    ),
    "cohere2": Cohere2Config(
        name="tiny",
        layer_kinds=tile("LLG", 3),
        window=16,
        rope=Rope(theta=5e4),
        logit_scale=0.25,
        norm_eps=1e-5,
        **SIZES,
    ),
    "smollm3": SmolLM3Config(
        name="tiny",
        layer_kinds=tile("G", 5),
        window=None,
        rope=Rope(theta=5e6),
        rotated=(True, True, True, False, True),
        tied=True,
        **SIZES,
    ),
    "qwen2": Qwen2Config(
        name="tiny",
        layer_kinds=tile("G", 2),
        rope=YarnRope(theta=1e6, factor=4.0, original_context=128),
        tied=True,
        **SIZES,
    ),
    "qwen3": Qwen3Config(
        name="tiny",
        layer_kinds=tile("G", 2),
        rope=Rope(theta=1e6, factor=2.0),
        tied=False,
        **SIZES,
    ),
    "ministral3": Ministral3Config(
        name="tiny",
        layer_kinds=tile("G", 2),
        rope=YarnRope(theta=1e6, factor=16.0, original_context=32, attention_factor=1.0),
        query_growth=0.1,
        tied=False,
        **SIZES,
    ),
    "gpt_oss": GptOssConfig(
        name="tiny",
        layer_kinds=tile("LG", 2),
        window=16,
        rope=YarnRope(theta=1e4, factor=8.0, original_context=64, truncate=False),
        experts=4,
        chosen=2,
        **SIZES,
    ),
    "mamba2": Mamba2Config(
        name="tiny",
        depth=2,
        state_size=16,
        taps=3,
        tied=False,
        **SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_heads": 8, "head_dim": 16},
    ),
    "rwkv7": RWKV7Config(
        name="tiny",
        depth=2,
        decay_rank=16,
        rate_rank=24,
        value_rank=8,
        gate_rank=32,
        norm_eps=1e-5,
        **SIZES | {"hidden_size": 128, "num_heads": 2},
    ),
}
"""A configuration of every family that the format can hold: it leaves some numbers to convention."""


def raw_k_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random blocks of a K-quant, which the package cannot make: any bytes are valid but for the half-float scales."""
    rows, columns = shape
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, block_bytes), dtype=np.uint8)
    halves = rng.uniform(1e-4, 1e-3, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.Q6_K:
        blocks[..., -2:] = halves[..., :2]
    else:
        blocks[..., :4] = halves
    return blocks.reshape(rows, -1)


def _gemma3(config: Gemma3Config) -> dict[str, object]:
    rope = config.rope_global
    scaling = {} if rope.factor == 1 else {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    return {"attention.sliding_window": config.window, "rope.freq_base": rope.theta, **scaling}


def _rope(config: Gemma2Config | Llama3Config | SmolLM3Config | Exaone4Config | Cohere2Config) -> dict[str, object]:
    return {"rope.freq_base": config.rope.theta, "rope.dimension_count": config.head_dim}


def _gpt_oss(config: GptOssConfig) -> dict[str, object]:
    assert isinstance(config.rope, YarnRope)
    return {
        "attention.sliding_window": config.window,
        "rope.freq_base": config.rope.theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": config.rope.factor,
        "rope.scaling.original_context_length": config.rope.original_context,
        "expert_count": config.experts,
        "expert_used_count": config.chosen,
        "expert_feed_forward_length": config.intermediate_size,
    }


def _gemma4(config: Gemma4Config) -> dict[str, object]:
    """As the converter writes them: global layers' lengths go by the plain keys."""
    local = [kind == "local" for kind in config.layer_kinds]
    wide = 2 if config.wide_shared else 1
    widths = {f"attention.{part}_length": config.global_head_dim for part in ("key", "value")}
    return {
        **_windows(config),
        **widths,
        **{f"{key}_swa": config.head_dim for key in widths},
        "attention.head_count_kv": [config.num_kv_heads if own else config.global_kv_heads for own in local],
        "attention.shared_kv_layers": config.shared_layers,
        "feed_forward_length": [
            config.intermediate_size * (wide if index >= config.unshared else 1) for index in range(config.num_layers)
        ],
        "embedding_length_per_layer_input": config.layer_embedding,
        "rope.freq_base": config.rope_global.theta,
        "rope.freq_base_swa": config.rope_local.theta,
        "rope.dimension_count": config.global_head_dim,
        "rope.dimension_count_swa": config.head_dim,
        "final_logit_softcapping": config.logit_softcap,
        "expert_count": config.experts,
        "expert_used_count": config.chosen,
        "expert_feed_forward_length": config.expert_size,
    }


def _windows(config: LocalGlobalConfig) -> dict[str, object]:
    local = [kind == "local" for kind in config.layer_kinds]
    return {"attention.sliding_window": config.window, "attention.sliding_window_pattern": local}


def _olmo3(config: Olmo3Config) -> dict[str, object]:
    rope = config.rope_global
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    return {**_windows(config), "rope.freq_base": rope.theta, **scaling}


def _gemma2(config: Gemma2Config) -> dict[str, object]:
    caps = {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap or 0.0}
    return {"attention.sliding_window": config.window, **_rope(config), **caps}


def _exaone4(config: Exaone4Config) -> dict[str, object]:
    return {**_windows(config), **_rope(config)}


def _cohere2(config: Cohere2Config) -> dict[str, object]:
    epsilon = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": config.norm_eps}
    return {**_windows(config), **_rope(config), **epsilon, "logit_scale": config.logit_scale}


def _qwen(config: Qwen2Config | Qwen3Config) -> dict[str, object]:
    rope = config.rope
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if isinstance(rope, YarnRope):
        scaling |= {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": rope.original_context}
    return {"rope.freq_base": rope.theta, **scaling}


def _ministral3(config: Ministral3Config) -> dict[str, object]:
    """As a published file has them."""
    rope = config.rope
    return {
        "rope.freq_base": rope.theta,
        "rope.dimension_count": config.head_dim,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope.factor,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
        "rope.scaling.yarn_log_multiplier": 1.0,
        "rope.scaling.original_context_length": rope.original_context,
        "attention.temperature_scale": config.query_growth,
    }


def _mamba2(config: Mamba2Config) -> dict[str, object]:
    """As the converter writes them, zeros included: its heads do not attend."""
    widths = dict.fromkeys(("attention.head_count_kv", "attention.key_length", "attention.value_length"))
    return {
        **widths,
        "attention.head_count": 0,
        "feed_forward_length": 0,
        "ssm.conv_kernel": config.taps,
        "ssm.inner_size": config.intermediate_size,
        "ssm.state_size": config.state_size,
        "ssm.time_step_rank": config.num_heads,
        "ssm.group_count": config.num_kv_heads,
    }


def _rwkv7(config: RWKV7Config) -> dict[str, object]:
    """As the converter writes them, less the context, which it always says is 2**20."""
    of_attention = ("head_count_kv", "key_length", "value_length", "layer_norm_rms_epsilon")
    return {
        **dict.fromkeys(f"attention.{key}" for key in of_attention),
        "attention.head_count": 0,
        "attention.layer_norm_epsilon": config.norm_eps,
        "wkv.head_size": config.head_dim,
        "attention.decay_lora_rank": config.decay_rank,
        "attention.iclr_lora_rank": config.rate_rank,
        "attention.value_residual_mix_lora_rank": config.value_rank,
        "attention.gate_lora_rank": config.gate_rank,
    }


_OWN: dict[str, Callable[[Any], dict[str, object]]] = {
    "gemma3": _gemma3,
    "llama3": _rope,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "ministral3": _ministral3,
    "gemma2": _gemma2,
    "olmo3": _olmo3,
    "exaone4": _exaone4,
    "cohere2": _cohere2,
    "smollm3": _rope,
    "gpt_oss": _gpt_oss,
    "gemma4": _gemma4,
    "mamba2": _mamba2,
    "rwkv7": _rwkv7,
}
"""Metadata of each family; None leaves a key out."""


def _norms_shifted(config: DecoderConfig, name: str, values: np.ndarray) -> np.ndarray:
    return values + (1 if name.endswith("norm.weight") else 0)


def _heads_permuted(config: DecoderConfig, name: str, values: np.ndarray) -> np.ndarray:
    """As llama.cpp's converter permutes queries and keys: halves of a head become neighbours."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    rows, width = values.shape
    return values.reshape(rows // config.head_dim, 2, config.head_dim // 2, width).swapaxes(1, 2).reshape(rows, width)


def _spaces_reshaped(config: Mamba2Config, name: str, values: np.ndarray) -> np.ndarray:
    """As llama.cpp's converter reshapes what is of a state space, and takes what rates are, not their logarithms."""
    if name.endswith(".A_log"):
        values = -np.exp(values)
    if name.endswith("mixer.norm.weight"):
        return values.reshape(config.num_kv_heads, -1)
    return values[:, None] if name.endswith((".A_log", ".D")) else np.squeeze(values)


def _by_expert(
    config: GptOssConfig | Gemma4Config, name: str, values: np.ndarray, gates_apart: bool
) -> list[tuple[str, np.ndarray]]:
    """Tensors with an axis of experts, gates and ups apart, or as one."""
    stacked = values.reshape(config.experts, -1, *values.shape[1:])
    last, block = "bias" if name.endswith("_bias") else "weight", f"blk.{name.split('.')[1]}"
    if "down" in name:
        return [(f"{block}.ffn_down_exps.{last}", stacked)]
    if isinstance(config, Gemma4Config) and not gates_apart:
        return [(f"{block}.ffn_gate_up_exps.{last}", stacked)]
    gates, ups = np.split(stacked, 2, axis=1)
    return [(f"{block}.ffn_gate_exps.{last}", gates), (f"{block}.ffn_up_exps.{last}", ups)]


_OLD_NAMES = (
    ("embed_tokens", "embeddings"),
    ("ffn", "feed_forward"),
    ("attn", "attention"),
    ("_lora.lora.0.weight", "1"),
    ("_lora.lora.2.weight", "2"),
    ("_lora.lora.2.bias", "0"),
    ("feed_forward_norm", "ln2"),
    ("g_norm", "ln_x"),
)
"""What llama.cpp's converter calls RWKV-7's tensors, one after the other, before it looks names up."""


def _recurrent(names: gguf.TensorNameMap, name: str, weights: Mapping[str, Weight]) -> dict[str, np.ndarray]:
    """As llama.cpp's converter writes RWKV-7's tensors: mixes as one, and ranks of values that no first layer reads."""
    values = weights[name].read().numpy()
    if ".attn.x_" in name:
        mixes = [weights[name[:-1] + use].read().numpy() for use in "rwkvag"]
        fused = f"blk.{name.split('.')[1]}.time_mix_lerp_fused.weight"
        return {fused: np.stack(mixes)} if name.endswith("x_r") else {}
    whole = name if name.startswith("lm_head") else f"model.{name}"
    for ours, theirs in _OLD_NAMES:
        whole = whole.replace(ours, theirs)
    in_file = names.get_name(whole, try_suffixes=(".weight", ".bias"))
    if not in_file.endswith((".weight", ".bias")):
        in_file += ".weight"
    values = values.flatten() if name.endswith("r_k") else np.squeeze(values)
    unread = {in_file.replace("mix_a", "mix_v"): values} if in_file.startswith("blk.0.time_mix_a") else {}
    return {in_file: values, **unread}


_FACTORS = {
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}
"""Names that the converter of Gemma 4 gives itself."""

_STORED: dict[str, Callable[[Any, str, np.ndarray], np.ndarray]] = {
    "gemma2": _norms_shifted,
    "gemma3": _norms_shifted,
    "llama3": _heads_permuted,
    "smollm3": _heads_permuted,
    "ministral3": _heads_permuted,
    "mamba2": _spaces_reshaped,
}
"""What a family's tensors become in the file, where they do not stay as they are."""


def _divisors(head_dim: int, rope: Llama3Rope) -> np.ndarray:
    """By what frequencies are divided, one by one, as llama.cpp's converter stores it."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope.theta ** (index / head_dim)
        slow, fast = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
        if wavelength < fast:
            divisors.append(1.0)
        elif wavelength > slow:
            divisors.append(rope.factor)
        else:
            smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            divisors.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.array(divisors, np.float32)


def write_gguf(
    path: Path,
    config: DecoderConfig,
    weights: Mapping[str, Weight],
    *,
    types: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    metadata: Mapping[str, object] | None = None,
    architecture: str | None = None,
    general: Mapping[str, object] | None = None,
    tokens: Mapping[int, str] | None = None,
    gates_apart: bool = False,
) -> Path:
    """Write a model.

    Args:
        path: Where to.
        config: Goes to the metadata.
        weights: By our names.
        types: Quantisation by the name's end, such as {"attn_q.weight": "Q4_0"}; else F32.
        skip: Tensors, by their names in the file, that are left out.
        metadata: Replaces metadata by key (without the architecture's prefix); None leaves it out.
        architecture: What `general.architecture` says; by default what llama.cpp calls the family.
        general: Metadata by their whole keys.
        tokens: Pieces by id, in the place of unused ones.
        gates_apart: Whether gates and ups of experts are two tensors, in a family whose converter makes one of them.
    """
    architecture = architecture or gguf_format(architecture_of(config.architecture)).name
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, object] = {
        "context_length": config.context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        **_OWN[config.architecture](config),
    }
    values |= metadata or {}
    _add_metadata(writer, {f"{architecture}.{key}": value for key, value in values.items()} | dict(general or {}))
    if isinstance(config, RWKV7Config):
        add_world_tokenizer(writer, config.vocab_size)
    else:
        add_byte_tokenizer(writer, config.vocab_size, tokens)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    family = architecture_of(config.architecture)
    names = gguf.get_tensor_name_map(kinds[gguf_format(family).name], config.num_layers)
    rng = np.random.default_rng(0)
    for name, weight in weights.items():
        if isinstance(config, RWKV7Config):
            for in_file, values_of_part in _recurrent(names, name, weights).items():
                if in_file not in skip:
                    _add_tensor(writer, in_file, values_of_part, types or {}, rng)
            continue
        whole = in_checkpoint(name, renames=family.huggingface.renames).replace(".dt_bias", ".dt_proj.bias")
        stored = weight.read().float().numpy()
        if isinstance(config, GptOssConfig | Gemma4Config) and ".experts." in name:
            for in_file, values_of_part in _by_expert(config, name, stored, gates_apart):
                _add_tensor(writer, in_file, values_of_part, types or {}, rng)
            continue
        in_file = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        if isinstance(config, Gemma4Config) and name.endswith(tuple(_FACTORS)):
            in_file = f"blk.{name.split('.')[1]}.{next(_FACTORS[end] for end in _FACTORS if name.endswith(end))}"
        if isinstance(config, GptOssConfig) and name.endswith("sinks"):
            in_file += ".weight"
        if in_file in skip:
            continue
        if config.architecture in _STORED:
            stored = _STORED[config.architecture](config, name, stored)
        _add_tensor(writer, in_file, stored, types or {}, rng)
    rope = getattr(config, "rope", None)
    if isinstance(config, Gemma4Config) and "rope_freqs.weight" not in skip:
        turning = int(config.rope_global.frequencies(config.global_head_dim).count_nonzero())
        divisors = [1.0] * turning + [1e30] * (config.global_head_dim // 2 - turning)
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    if isinstance(rope, Llama3Rope):
        writer.add_tensor("rope_freqs.weight", _divisors(config.head_dim, rope))
    return _write(writer, path)


def write_mmproj(
    path: Path,
    config: Gemma3VisionConfig,
    weights: Mapping[str, Weight],
    *,
    types: Mapping[str, str] | None = None,
    first_converter: bool = False,
    metadata: Mapping[str, object] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write the encoder of a model that sees images.

    Args:
        path: Where to.
        config: Goes to the metadata.
        weights: By our names; those of the text decoder are left out.
        types: As in `write_gguf`.
        first_converter: Whether fc1 and fc2 go by each other's names, as in llama.cpp's first files.
        metadata: Replaces metadata by their whole keys; None leaves it out.
        tensors: Replaces tensors by their names in the file; None leaves one out.
    """
    vision = config.vision
    values: dict[str, object] = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "gemma3",
        "clip.use_gelu": True,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.num_layers,
        "clip.vision.projection_dim": config.hidden_size,
        "clip.vision.attention.head_count": vision.num_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.norm_eps,
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
    }
    if (scale := vision.side // math.isqrt(config.images.soft_tokens)) != 4:
        values["clip.vision.projector.scale_factor"] = scale
    writer = gguf.GGUFWriter(path, "clip")
    _add_metadata(writer, values | dict(metadata or {}))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_layers)
    stored: dict[str, np.ndarray | None] = {}
    for name, weight in weights.items():
        if not name.startswith(("vision_tower.", "multi_modal_projector.")):
            continue
        theirs = name.replace("vision_tower.", "vision_tower.vision_model.").replace("_weight", ".weight")
        if first_converter:
            theirs = re.sub(r"fc([12])", lambda match: f"fc{3 - int(match[1])}", theirs)
        in_file = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert in_file is not None
        stored[in_file] = weight.read().numpy() + (1 if "soft_emb_norm" in name else 0)
    for in_file, numbers in (stored | dict(tensors or {})).items():
        if numbers is not None:
            _add_tensor(writer, in_file, numbers, types or {}, np.random.default_rng(0))
    return _write(writer, path)


def _add_metadata(writer: gguf.GGUFWriter, values: Mapping[str, object]) -> None:
    for key, value in values.items():
        match value:
            case str():
                writer.add_string(key, value)
            case float():
                writer.add_float32(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case list():
                writer.add_array(key, value)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, types: Mapping[str, str], rng: np.random.Generator
) -> None:
    kind = next((kind for end, kind in types.items() if name.endswith(end)), "F32")
    quant_type = gguf.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        data = raw_k_blocks(rng, values.shape, quant_type)
    else:
        data = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), quant_type)
    writer.add_tensor(name, data, raw_dtype=quant_type)


def _write(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, tokens: Mapping[int, str] | None = None) -> None:
    """Gemma's kind of tokenizer, with a handful of merges."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [3] * 4 + [6] * 256
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "llo", "hello", "\u2581hello"]
    pieces += [*words, "<start_of_turn>", "<end_of_turn>", "\n\n", "  "]
    kinds += [1] * len(words) + [3, 3, 4, 4]
    unused = vocab_size - len(pieces)
    pieces += [f"<unused{index}>" for index in range(unused)]
    for index, piece in (tokens or {}).items():
        pieces[index] = piece
    kinds += [3] * unused
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(index) for index in range(vocab_size)])
    writer.add_token_types(kinds)


def add_world_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """RWKV's kind of tokenizer, whose pieces are bytes as Python escapes them."""
    pieces = ["<s>", *(repr(bytes([byte]))[2:-1] for byte in range(256)), "he", "hello", "\\n\\n"]
    padding = [f"[PAD{index}]" for index in range(len(pieces), vocab_size)]
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(pieces + padding)
    writer.add_token_types([3] + [1] * (len(pieces) - 1) + [5] * len(padding))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(len(pieces) - 1)
